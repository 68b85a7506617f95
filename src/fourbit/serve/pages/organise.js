"use strict";

const token = location.pathname.split("/").pop();
const $ = id => document.getElementById(id);
const headers = { Authorization: `Bearer ${token}` };
const POLL_MS = 2000;

const percent = value => `${(100 * value).toFixed(0)}%`;
const number = value => value.toFixed(2).replace("-", "−");
const between = (found, write) => found ? `${write(found.value)} (${write(found.low)} to ${write(found.high)})` : "–";

function element(tag, text, kind) {
  const found = document.createElement(tag);
  if (text instanceof Node) found.append(text);
  else found.textContent = text;
  if (kind) found.className = kind;
  return found;
}

/** Fill a table: columns are [title, kind], cells texts or nodes. */
function table(id, section, columns, rows) {
  $(section).hidden = !rows.length;
  const head = element("tr", "");
  head.append(...columns.map(([title, kind]) => element("th", title, kind)));
  const body = rows.map(cells => {
    const row = element("tr", "");
    row.append(...cells.map((cell, at) => element("td", cell, columns[at][1])));
    return row;
  });
  $(id).replaceChildren(head, ...body);
}

function drawn(shapes, label) {
  const space = "http://www.w3.org/2000/svg", picture = document.createElementNS(space, "svg");
  picture.setAttribute("viewBox", "0 0 180 18");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", label);
  for (const [tag, attributes] of shapes) {
    const shape = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
    picture.append(shape);
  }
  return picture;
}

const bar = share => [
  ["rect", { class: "track", x: 0, y: 5, width: 180, height: 8, rx: 4 }],
  ["rect", { class: "fill", x: 0, y: 5, width: 180 * share, height: 8, rx: 4 }],
];

function interval(share) {
  const [low, high] = [180 * share.low, 180 * share.high];
  const line = (kind, x1, y1, x2, y2) => ["line", { class: kind, x1, y1, x2, y2 }];
  return drawn([...bar(share.share), line("half", 90, 0, 90, 18), line("whisker", low, 9, high, 9),
    line("whisker", low, 4, low, 14), line("whisker", high, 4, high, 14)],
  `${percent(share.share)}, from ${percent(share.low)} to ${percent(share.high)}`);
}

function ago(seconds) {
  if (seconds === null) return "–";
  const past = Math.max(0, Date.now() / 1000 - seconds);
  if (past < 90) return "now";
  return past < 5400 ? `${Math.round(past / 60)} min ago` : past < 129600 ? `${Math.round(past / 3600)} h ago`
    : `${Math.round(past / 86400)} days ago`;
}

function tile(name, value, remark) {
  const found = element("div", "", "card tile");
  found.append(element("small", name), element("b", value), element("small", remark));
  return found;
}

function fill(survey) {
  $("title").replaceChildren(survey.systems.join(", "), element("span", " compared by people"));
  const left = survey.raters.reduce((sum, rater) => sum + rater.left, 0);
  $("tiles").replaceChildren(
    tile("votes", survey.votes.toLocaleString("en"), survey.live ? "prompts of the raters" : `${left.toLocaleString("en")} to come`),
    tile("pairs", survey.pairs.toLocaleString("en"),
      `${survey.covered.toLocaleString("en")} with a vote, ${survey.shared.toLocaleString("en")} with two or more`),
    tile("raters agree (Fleiss κ)", survey.fleiss ? number(survey.fleiss.value) : "–",
      survey.fleiss ? `${number(survey.fleiss.low)} to ${number(survey.fleiss.high)}; 0 is chance, 1 always`
        : "needs pairs that two raters voted on"),
    tile("shown first", survey.shown_first === null ? "–" : percent(survey.shown_first), "of the points; 50% without bias"),
  );
  table("shares", "wins",
    [["better", "name"], ["than", "name"], ["points"], [""], ["95% interval"], ["wins"], ["ties"], ["both bad"], ["losses"]],
    survey.shares.map(share => share.share < 0.5 ? turned(share) : share).sort((one, other) => other.share - one.share).map(share => [
      share.first, share.second, percent(share.share), interval(share), `${percent(share.low)} – ${percent(share.high)}`,
      share.wins, share.ties - share.both_bad, share.both_bad, share.losses]));
  table("ranking", "ranks", [["system", "name"], ["Bradley–Terry"], ["95% interval"], ["votes"], ["cannot be told apart from", "name"]],
    survey.systems.length < 3 ? [] : survey.ranking.map(row => [
      row.model, row.elo.toFixed(0), `${row.low.toFixed(0)} – ${row.high.toFixed(0)}`, row.matches, row.untold.join(", ")]));
  table("raters", "people", [["rater", "name"], ["voted on"], [""], ["A"], ["tie"], ["both bad"], ["B"], ["seconds a vote"], ["last vote"]],
    survey.raters.map(rater => {
      const total = rater.done + rater.left, share = total ? rater.done / total : 0;
      return [rater.rater, survey.live ? rater.done : `${rater.done} of ${total}`,
        survey.live ? "" : drawn(bar(share), percent(share)), rater.choices.A, rater.choices.tie, rater.choices["both bad"],
        rater.choices.B, rater.median_seconds === null ? "–" : rater.median_seconds.toFixed(0), ago(rater.last_at)];
    }));
  table("agreement", "agrees", [["between", "name"], ["and", "name"], ["both voted on"], ["same vote"], ["Cohen κ"]],
    survey.agreements.map(pair => [pair.first, pair.second, pair.same ? pair.same.count : 0,
      between(pair.same, percent), between(pair.cohen, number)]));
  $("notes").hidden = !survey.notes.length;
  $("notes").replaceChildren(...survey.notes.map(note => element("li", note)));
}

const turned = share => ({ ...share, first: share.second, second: share.first, wins: share.losses, losses: share.wins,
  share: 1 - share.share, low: 1 - share.high, high: 1 - share.low });

async function refresh() {
  if (!document.hidden) {
    try {
      const response = await fetch("/api/survey", { headers });
      if (response.status === 401) {
        $("foot").textContent = "This link is not known here any more.";
        return;
      }
      if (!response.ok) throw new Error();
      const survey = await response.json();
      fill(survey);
      $("foot").textContent = "A tie is half a point, and so is both bad. Intervals are 95%, over prompts. "
        + `Counted at ${new Date(1000 * survey.counted_at).toLocaleTimeString()}; the page keeps up by itself.`;
    } catch {
      $("foot").textContent = "The arena cannot be reached; what is shown may be old. Trying again…";
    }
  }
  setTimeout(refresh, POLL_MS);
}

$("download").addEventListener("click", async () => {
  const response = await fetch("/api/votes.jsonl", { headers });
  if (!response.ok) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = "votes.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
});

document.addEventListener("visibilitychange", () => { if (!document.hidden) $("foot").textContent = "Counting…"; });
refresh();
