"use strict";

// The last part of the address is the rater's token. It goes with every request as a header, never as a cookie.
const token = location.pathname.split("/").pop();
const $ = id => document.getElementById(id);
const screens = ["pair", "ask", "waiting", "done", "trouble"];
const labels = { A: "A is better", B: "B is better", tie: "Tie", "both bad": "Both bad" };
const keys = { a: "A", 1: "A", t: "tie", 2: "tie", x: "both bad", 3: "both bad", b: "B", 4: "B" };
const SETTLE_MS = 250; // a second press of a key is no vote on the next pair
const POLL_MS = 1000;

let pair = null, correcting = false, busy = false, plain = false, voted = false;
let keysOn = remembered() !== "off";

/** Whether keys vote, from one visit to the next; a browser may be told to remember nothing. */
function remembered(value) {
  try {
    if (value) localStorage.setItem("arena-keys", value);
    return localStorage.getItem("arena-keys");
  } catch {
    return null;
  }
}

class Refusal extends Error {
  constructor(status, found) {
    super(found.error || `The server answers ${status}.`);
    this.status = status;
  }
}

async function call(path, body) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refusal(response.status, found);
  return found;
}

const wait = ms => new Promise(done => setTimeout(done, ms));
const passing = error => !(error instanceof Refusal) || error.status >= 500;

/** Call until the server answers, and say meanwhile that it does not. */
async function insist(path, body) {
  for (let pause = 500; ; pause = Math.min(2 * pause, 8000)) {
    try {
      return await call(path, body);
    } catch (error) {
      if (!passing(error)) throw error;
      notice(body ? "Not saved yet: the arena cannot be reached. Trying again…" : "The arena cannot be reached. Trying again…", true);
      if (!screens.some(id => !$(id).hidden)) trouble("The arena cannot be reached", "Trying again…");
      await wait(pause);
    }
  }
}

function notice(text, problem = false) {
  for (const place of document.querySelectorAll(".notice")) {
    place.textContent = text;
    place.classList.toggle("problem", problem);
  }
}

function show(id) {
  for (const screen of screens) $(screen).hidden = screen !== id;
  for (const button of document.querySelectorAll(".undo")) {
    button.hidden = !voted;
    button.firstChild.textContent = correcting ? "Keep my vote " : "Change last vote ";
  }
}

function trouble(title, text) {
  $("trouble-title").textContent = title;
  $("trouble-text").textContent = text;
  show("trouble");
}

function fail(error) {
  if (error.status === 401) trouble("This link is not known here", "Please ask the organiser for a new one.");
  else if (pair) notice(error.message, true);
  else trouble("Something went wrong", error.message);
}

function fillText() {
  for (const name of ["question", "a", "b"]) {
    const place = $(name);
    if (!pair.text[name].trim()) {
      place.innerHTML = '<p class="empty">(no answer)</p>';
    } else if (plain) {
      place.innerHTML = '<div class="plain"></div>';
      place.firstChild.textContent = pair.text[name];
    } else {
      place.innerHTML = pair.html[name]; // made by the server, which lets no tag of an answer through
    }
  }
}

function progress(state) {
  const total = state.done + state.left;
  $("rater").textContent = `· ${state.rater}`;
  $("thanks").textContent = `, ${state.rater}`;
  $("track").hidden = state.live || !total;
  $("track").setAttribute("aria-valuemax", total);
  $("track").setAttribute("aria-valuenow", state.done);
  $("fill").style.width = `${total ? (100 * state.done) / total : 0}%`;
  $("count").textContent = state.live
    ? `${state.done} ${state.done === 1 ? "vote" : "votes"}`
    : `${state.done} of ${total}`;
  $("all").textContent = `You have voted on all ${state.done} pairs that were for you. You can close this page.`;
  document.title = state.state === "pair" && !state.live
    ? `Pair ${state.done + 1} of ${total} · fourbit arena` : "fourbit arena";
}

function ready(enabled) {
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = !enabled;
}

function mark(choice) {
  for (const button of document.querySelectorAll("[data-choice]"))
    button.setAttribute("aria-pressed", String(button.dataset.choice === choice));
}

function showPair(found) {
  pair = found;
  fillText();
  mark(found.choice);
  show("pair");
  for (const name of ["question-box", "a", "b"]) $(name).scrollTop = 0;
  window.scrollTo(0, 0);
  $("question-box").focus({ preventScroll: true });
  ready(false);
  setTimeout(() => { busy = false; ready(true); }, SETTLE_MS);
}

async function next() {
  correcting = false;
  pair = null;
  try {
    const state = await insist("/api/next");
    voted = state.done > 0;
    progress(state);
    if (state.state === "pair") return showPair(state.pair);
    busy = false;
    if (state.state === "answering") {
      show("waiting");
      await wait(POLL_MS);
      return await next();
    }
    show(state.state);
    if (state.state === "ask") {
      if (state.refusal) notice(state.refusal, true);
      else $("prompt").value = "";
      $("prompt").focus();
    } else {
      document.querySelector("#done h2").focus();
    }
  } catch (error) {
    busy = false;
    fail(error);
  }
}

async function vote(choice) {
  if (busy || !pair) return;
  busy = true;
  ready(false);
  mark(choice);
  try {
    await insist("/api/vote", { ticket: pair.ticket, choice, correct: correcting });
    notice(`${correcting ? "Changed to" : "Saved"}: ${labels[choice]}.`);
  } catch (error) {
    if (error.status !== 409) {
      busy = false;
      ready(true);
      return fail(error);
    }
    notice(error.message, true);
  }
  await next();
}

/** Show the pair that was voted on last once more; or, where that is shown, go on. */
async function undo() {
  if (busy || !voted) return;
  busy = true;
  if (correcting) {
    notice("");
    return next();
  }
  try {
    const found = await insist("/api/last");
    correcting = true;
    notice("This is the pair you voted on last. Choose again to change your vote.");
    showPair(found.pair);
  } catch (error) {
    busy = false;
    fail(error);
  }
}

function togglePlain() {
  plain = !plain;
  $("plain").setAttribute("aria-pressed", String(plain));
  $("plain").firstChild.textContent = plain ? "Formatted " : "Plain text ";
  if (pair) fillText();
}

function showKeys() {
  $("keys").textContent = keysOn ? "Keys on" : "Keys off";
  $("keys").setAttribute("aria-pressed", String(keysOn));
  for (const key of document.querySelectorAll("#pair kbd")) key.hidden = !keysOn;
}

for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => vote(button.dataset.choice));
for (const button of document.querySelectorAll(".undo")) button.addEventListener("click", undo);
$("plain").addEventListener("click", togglePlain);
$("keys").addEventListener("click", () => {
  keysOn = !keysOn;
  remembered(keysOn ? "on" : "off");
  showKeys();
});

$("ask").addEventListener("submit", async event => {
  event.preventDefault();
  if (busy) return;
  busy = true;
  try {
    notice("");
    await insist("/api/ask", { prompt: $("prompt").value });
  } catch (error) {
    if (error.status !== 409) { // which says that the prompt is being answered already
      busy = false;
      return notice(error.message, true);
    }
  }
  await next();
});

document.addEventListener("keydown", event => {
  if (event.target instanceof HTMLTextAreaElement) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
    return;
  }
  if (!keysOn || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "u") undo();
  else if (key === "p" && pair) togglePlain();
  else if (keys[key] && pair) vote(keys[key]);
});

showKeys();
next();
