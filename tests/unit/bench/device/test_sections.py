"""Every section, in miniature and in this process: what it measures, and that a failure costs only itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fourbit.bench import rows
from fourbit.bench.case import OURS
from fourbit.bench.device import cases, checks, clock, decode, models, ops, paging, parity
from fourbit.bench.device.sections import KINDS, chosen, sections
from fourbit.bench.device.settings import NOTES, ROWS, Ledger, Settings
from fourbit.bench.peers import BITSANDBYTES
from fourbit.bench.rows import Row
from fourbit.errors import InputError
from fourbit.models.shapes import SHAPES, random_model
from fourbit.quant import QuantConfig


def found(settings: Settings) -> dict[tuple[str, str], Row]:
    return {(row.case, row.contender): row for row in rows.read(Path(settings.folder) / ROWS)}


def notes(settings: Settings) -> str:
    path = Path(settings.folder) / NOTES
    return path.read_text() if path.exists() else ""


def test_what_a_section_is_told_survives_the_command_line(settings: Settings) -> None:
    assert Settings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (ops.machine, {("device-machine", "limit: copy"), ("device-machine", "limit: GEMM bf16")}),
        (ops.quantize, {("quantize-32x64", OURS), ("quantize-48x128", BITSANDBYTES)}),
        (ops.dequantize, {("dequantize-32x64", OURS), ("dequantize-48x128-nested", BITSANDBYTES)}),
        (ops.matrix_vector, {("linear-32x64-1", cases.PLAIN_SCALES), ("linear-48x128-1", cases.BNB_KERNEL)}),
        (ops.small_batches, {("linear-48x128-3", OURS), ("linear-48x128-3", cases.BNB_EAGER)}),
        (ops.large, {("linear-48x128-66", OURS), ("linear-48x128-66", cases.TORCH_BF16)}),
    ],
)
def test_an_operation_is_measured_and_all_agree(section: Any, expected: set[Any], settings: Settings) -> None:
    section(settings, Ledger(settings))
    measured = found(settings)
    assert expected <= set(measured)
    assert all(row.median > 0 and row.samples == 1 for row in measured.values())
    assert all(row.share is not None for (_, name), row in measured.items() if name == OURS)
    assert notes(settings) == ""  # nobody was left out, and no two results differ


def test_variants_of_a_kernel_are_timed_and_one_that_refuses_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise NotImplementedError("not for me")

    ways = {"linear": {"twice as good": torch.ops.fourbit.linear, "picky": refuses}}
    monkeypatch.setattr(ops, "variants", lambda operation: ways.get(operation, {}))
    ops.small_batches(settings, Ledger(settings))
    assert ("linear-48x128-3", "fourbit, variant twice as good") in found(settings)
    assert ("linear-48x128-3", "fourbit, variant picky") not in found(settings)
    assert "linear-48x128-3: fourbit, variant picky is left out: NotImplementedError: not for me" in notes(settings)


def test_every_comparison_with_the_reference_holds(settings: Settings) -> None:
    checks.run(settings, Ledger(settings))
    assert "WRONG" not in notes(settings)
    compared = list(checks.compare(settings))
    assert len(compared) >= 30
    products = [worst for name, worst in compared if name.startswith("linear ")]
    assert products
    assert 0 < max(products) <= 1  # the bound is one that could be missed


def test_a_wrong_result_is_seen(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by two units in the last place of bf16, and one that gives not a number."""
    x = torch.randn(3, 64).bfloat16()
    wide = torch.randn(5, 64).double()
    exact = x.double() @ wide.t()
    assert checks._within(exact.bfloat16(), x, wide) <= 1
    size = float((x.double().abs() @ wide.abs().t()).max())
    assert checks._within(exact + 0.02 * size, x, wide) > 1
    assert checks._within(exact * float("nan"), x, wide) == float("inf")
    assert checks._same([torch.ones(2)], [torch.ones(2).double()]) == float("inf")
    monkeypatch.setattr(checks, "compare", lambda _: iter([("a thing", 1.5), ("another", float("nan"))]))
    checks.run(settings, Ledger(settings))
    assert notes(settings).count("WRONG") == 2


@pytest.mark.parametrize("contender", [OURS, cases.BNB_LEAN, cases.OUR_LORA, cases.PEFT_LORA])
def test_a_step_is_measured_with_and_without_checkpointing(contender: str, settings: Settings) -> None:
    models.step(settings, Ledger(settings), "tiny", contender)
    measured = found(settings)
    assert notes(settings) == ""
    for case in ("step-tiny-2x16-r4", "step-tiny-2x16-r4-checkpointing"):
        row = measured[case, contender]
        assert row.share is not None
        assert (case, "limit: GEMM bf16") in measured or contender != OURS
        # The same decoded weights for all, so the same loss but for rounding: ln 256 and a little.
        assert 5.5 < row.check < 5.8
    assert measured["step-tiny-2x16-r4", contender].check == pytest.approx(
        measured["step-tiny-2x16-r4-checkpointing", contender].check, rel=2**-8
    )


def test_a_contender_that_fails_leaves_a_sentence(settings: Settings) -> None:
    models.step(settings, Ledger(settings), "tiny", "unsloth")  # not installed here, or refuses a CPU
    assert notes(settings).count("unsloth is left out") == 2
    assert not (Path(settings.folder) / ROWS).exists() or not found(settings)


def test_an_operation_that_refuses_is_wrong_and_a_variant_that_does_is_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise ValueError("not of this shape")

    assert checks._guarded(refuses) == float("inf")  # type: ignore[arg-type]
    monkeypatch.setattr(
        checks, "variants", lambda operation: {"picky": refuses, "bad": lambda x, *_: x[..., :1] * 0 + 9}
    )
    compared = dict(checks.compare(settings))
    assert not any("picky" in name for name in compared)
    assert all(worst > 1 for name, worst in compared.items() if "variant bad" in name)


def test_decode_is_measured_and_its_ids_are_compared(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    decode.decode(settings, Ledger(settings), "tiny")
    measured = found(settings)
    assert ("decode-tiny-1", cases.BNB_EAGER) in measured
    assert ("decode-tiny-2", cases.BNB_EAGER) not in measured
    for batch in (1, 2):
        row = measured[f"decode-tiny-{batch}", OURS]
        assert row.share is not None
        assert ("left out" in notes(settings)) is False
    ledger = Ledger(settings)
    decode._compare("a case", cases.BNB_EAGER, [[1], [2], [9]], [[1], [2], [3]], ledger)
    assert "decode the same ids for 2 of 3 tokens" in notes(settings)


def test_both_loops_decode_the_same_ids() -> None:
    model: Any = random_model("tiny", QuantConfig(), dtype=torch.float32)
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        assert list(decode.our_loop(model, ids, 5)) == list(decode.eager_loop(model, ids, 5))


def test_the_cost_of_paging_is_measured(settings: Settings) -> None:
    paging.paging(settings, Ledger(settings), "tiny")
    measured = found(settings)
    assert {name for _, name in measured} == {OURS, cases.ON_THE_DEVICE}
    assert re.search("0.00 GB moved in a step", notes(settings)) is not None
    assert "left out" not in notes(settings)


def test_peak_memory_is_measured(settings: Settings) -> None:
    models.memory(settings, Ledger(settings), "tiny")
    measured = found(settings)
    assert notes(settings) == ""
    assert measured["memory-tiny-1x16-r4", OURS].median > 0.05  # GB; of the process, where there is no GPU
    assert ("memory-tiny-1x16-r4", cases.FP32_STATES) in measured


def test_fp32_states_step_as_adam_does() -> None:
    one, other = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    states = models._fp32_states([one])
    optimizer = torch.optim.Adam([other], lr=2e-4)
    # Ours leaves the bias correction out, so compare where it makes no difference: the direction of the first step.
    for parameter in (one, other):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5, 0.0])
    models._adam([one], states)
    optimizer.step()
    assert torch.equal((one - 1).sign(), (other - 1).sign())
    assert states[0][0].dtype == torch.float32


def test_the_fast_path_trains_like_the_reference(settings: Settings) -> None:
    parity.parity(settings, Ledger(settings))
    assert notes(settings) == ""


def test_losses_that_come_apart_are_seen(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = {"reference": [5.0, 4.0], "auto": [5.0, 4.2]}
    monkeypatch.setattr(parity, "losses", lambda _, backend, dtype: curves[backend])
    parity.parity(settings, Ledger(settings))
    assert "WRONG: the losses of the fast path are 0.20000 apart" in notes(settings)
    curves["auto"] = [5.0, 5.0]
    parity.parity(settings, Ledger(settings))
    assert "did not fall" in notes(settings)


def test_all_the_bars_are_there() -> None:
    def bars(name: str) -> dict[tuple[str, str], float]:
        case = cases.named(name)
        assert case is not None
        return {(bar.kind, bar.against or bar.ours): bar.bound for bar in case.bars}

    assert bars("linear-11008x4096-1") == {("speed", cases.PLAIN_SCALES): 0.97, ("share", "limit: read"): 0.7}
    assert ("share", "limit: read") not in bars("linear-4096x4096-1")  # 9 MB packed, below 20
    assert bars("linear-11008x4096-16") == {("speed", cases.TORCH_BF16): 1.0}
    assert bars("dequantize-11008x4096-nested") == {("share", "limit: copy"): 0.85}
    assert bars("quantize-22016x8192") == {("share", "limit: copy"): 0.5}
    for name in ("step-llama-7b-16x512-r64", "step-llama-7b-16x512-r64-checkpointing"):
        assert bars(name)["speed", "unsloth"] == 1.2
        assert bars(name)["speed", cases.BNB_LEAN] == 1.8
        assert bars(name)["speed", cases.PEFT_LORA] == 0.9
    assert bars("decode-llama-7b-1")["share", "limit: read"] == 0.45
    assert bars("decode-llama-33b-1")["share", "limit: read"] == 0.6
    assert bars("decode-llama-65b-1")["speed", cases.BNB_EAGER] == 8
    assert bars("decode-llama-7b-32")["speed", cases.TORCH_BF16] == 1
    assert bars("paging-llama-33b-16x512-r64") == {("speed", cases.ON_THE_DEVICE): 0.95}
    assert bars("memory-llama-65b-1x512-r64") == {("value", OURS): 40, ("value", cases.FP32_STATES): 46}


NAMES = [
    "device-machine",
    "quantize-11008x4096",
    "dequantize-11008x4096",
    "dequantize-32x64-nested",
    "linear-4096x4096-1",
    "linear-4096x4096-8",
    "linear-4096x4096-512",
    "step-llama-3.1-8b-16x512-r64-checkpointing",
    "step-qwen3-4b-3layers-1x256-r16",
    "decode-llama-65b-32",
    "decode-llama-7b-4layers-1",
    "memory-llama-13b-1x512-r64",
    "paging-llama-33b-16x512-r64",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_consistent_and_found_by_its_name(name: str) -> None:
    case = cases.named(name, ["a", "b"])
    assert case is not None
    assert case.name == name
    names = [contender.name for contender in case.contenders]
    assert len(set(names)) == len(names)
    assert {bar.ours for bar in case.bars} | {bar.against for bar in case.bars if bar.against} <= set(names)
    assert {one.share.limit for one in case.contenders if one.share} <= set(names)
    with pytest.raises(NotImplementedError, match="measured by its section"):
        case.contenders[0].setup(Path())


@pytest.mark.parametrize(
    "name", ["quantize-nf4", "linear-1", "step", "step-checkpointing", "decode-llama-9b-1", "load"]
)
def test_other_names_are_not_ours(name: str) -> None:
    assert cases.named(name) is None


def test_the_weights_that_a_token_reads_are_counted() -> None:
    """7B: 6.476 B parameters in layers at 4.127 bits, and a head of 131 M in bf16."""
    assert cases.decode_weight_bytes(SHAPES["llama-7b"], four_bits=True) == pytest.approx(3.603e9, rel=1e-3)
    assert cases.decode_weight_bytes(SHAPES["llama-7b"], four_bits=False) == pytest.approx(13.21e9, rel=1e-3)
    assert cases.decode_weight_bytes(SHAPES["llama-7b"], four_bits=True, layers=16) == pytest.approx(1.933e9, rel=1e-3)


def test_sections_are_chosen_by_kind() -> None:
    assert [one.kind for one in chosen(["ops", "machine"], None, quick=False)] == ["machine"] + ["ops"] * 5
    assert {one.kind for one in sections()} == set(KINDS)
    assert len({one.name for one in sections()}) == len(sections())
    shapes = {one.arguments[0] for one in sections(["qwen3-4b"]) if one.arguments}
    assert shapes == {"qwen3-4b"}
    with pytest.raises(InputError, match="no section called 'speed'; choose from machine, checks"):
        chosen(["speed"], None, quick=False)


def test_turns_are_taken_and_a_failure_is_noted() -> None:
    order: list[str] = []
    said: list[str] = []

    def broken() -> Any:
        raise RuntimeError("no such kernel\nand more")

    taken = clock.take_turns(
        {"a": lambda: [lambda: order.append("a")], "broken": broken, "b": lambda: [lambda: order.append("b")]},
        device="cpu",
        samples=2,
        note=said.append,
    )
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]  # first calls, a turn to warm up, two that count
    assert [len(one.seconds) for one in taken.values()] == [2, 2]
    assert said == ["broken is left out: RuntimeError: no such kernel"]
