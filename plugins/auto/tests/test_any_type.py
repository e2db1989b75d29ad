"""A type that no package provides: examined once, in a process of its own, and then split like any other."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_auto import any_type, examination
from splitlearn_auto.answers import Answer, UnprovenSetting, answer_from
from splitlearn_auto.examination import ExaminationError, answer_about, examine_apart
from splitlearn_auto.findings import CannotSplitError, Derived, Question
from splitlearn_auto.memory import recall, remember
from splitlearn_core import (
    AsyncModelManager,
    ConfigurationError,
    InvalidSplitError,
    LoadCancelledError,
    ModelConfig,
    Progress,
    SplitCausalLM,
    UnknownModelTypeError,
    load_split_model,
    plan_split,
)
from splitlearn_core.extension import registry

pytestmark = pytest.mark.libs

LLAMA = Answer({"model_type": "llama", "architecture": "LlamaForCausalLM"})
CUT = (2, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "splitlearn" / "families"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a tiny model of a type, once, and returns its folder."""
    folders: dict[str, Path] = {}

    def save(model_type: str) -> Path:
        from transformers import AutoConfig

        from splitlearn_auto.making import quiet, tiny_config, tiny_model

        if model_type not in folders:
            folders[model_type] = tmp_path_factory.mktemp(model_type)
            config, _ = tiny_config(model_type, AutoConfig.for_model(model_type), {})
            with quiet():
                tiny_model(config).save_pretrained(folders[model_type])
        return folders[model_type]

    return save


def unsplit(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def forbid(*_: object) -> tuple[Answer, bool]:
    raise AssertionError("it is examined again")


# -- from the first use to the later ones -----------------------------------------------------------


# A process of its own imports torch and transformers, and examines the type.
@pytest.mark.timeout(600)
@pytest.mark.sample(1)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_model_is_split_by_its_name_alone(
    saved: Callable[[str], Path], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the unsplit model; the first use says what it does, and the second does nothing."""
    import torch

    folder, seen = saved(model_type), list[Progress]()

    split = SplitCausalLM(*load_split_model(None, CUT, folder, progress=seen.append))

    stages = list(dict.fromkeys((step.stage, step.file) for step in seen if step.stage != "reading"))
    assert stages[:2] == [("resolving", ""), ("examining", model_type)]
    assert stages[-1] == ("ready", "")
    ids = torch.tensor([[5, 17, 42, 99, 3]])
    with torch.no_grad():
        assert torch.equal(split(ids).logits, unsplit(folder)(ids).logits)
    assert registry().plugin(model_type).entry.distribution == "splitlearn-auto"
    monkeypatch.setattr(any_type, "examine_apart", forbid)
    fresh = type(registry())()
    assert fresh.family(model_type).architecture == registry().family(model_type).architecture


@pytest.mark.timeout(600)
@pytest.mark.sample(1)
@pytest.mark.parametrize("model_type", ["mistral3", "qwen2_5_vl", "qwen3_5"])
def test_the_decoder_in_a_model_of_several(saved: Callable[[str], Path], model_type: str, tmp_path: Path) -> None:
    """It is found and proven, and text is that of the whole model; what is for images may be anything."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from splitlearn_auto.examining import examine

    derived = examine(model_type, {}, settings=False)
    assert derived.questions == []
    assert {name: derived.fields[name] for name in ("base", "text_config", "transformers_tables")} == {
        "base": "model.language_model",
        "text_config": "text_config",
        "transformers_tables": True,
    }
    remember(model_type, Answer(derived.fields))
    folder = saved(model_type)
    whole = getattr(transformers, derived.fields["architecture"]).from_pretrained(folder).eval()
    tensors = load_file(folder / "model.safetensors")
    used = {tensor.info.key for part in plan_split(folder, CUT).components for tensor in part.tensors}
    assert any("vis" in key for key in tensors.keys() - used)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    spoilt = {key: value if key in used else torch.full_like(value, torch.nan) for key, value in tensors.items()}
    save_file(spoilt, other / "model.safetensors", {"format": "pt"})

    split = SplitCausalLM(*load_split_model(None, CUT, other))

    ids = torch.tensor([[5, 17, 42, 99, 3], [7, 1, 64, 23, 9]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        assert torch.equal(split(ids).logits, whole(input_ids=ids).logits)
        assert torch.equal(split.generate(ids, **settings), whole.generate(input_ids=ids, **settings))


@pytest.mark.timeout(600)
def test_a_decoder_with_a_head_of_its_own(tmp_path: Path) -> None:
    """It is taken out of the whole, whose class needs images; in the file its names have a prefix."""
    import torch
    import transformers
    from transformers import AutoConfig

    from splitlearn_auto.examining import examine
    from splitlearn_auto.making import quiet, tiny_config

    derived = examine("llama4", {}, settings=False)
    assert (derived.questions, derived.fields["architecture"]) == ([], "Llama4ForCausalLM")
    remember("llama4", Answer(derived.fields))
    config, _ = tiny_config("llama4", AutoConfig.for_model("llama4"), {})
    with quiet():
        whole = transformers.Llama4ForConditionalGeneration(config)
        whole.save_pretrained(tmp_path)
    plan = plan_split(tmp_path, CUT)
    assert (plan.model_type, plan.num_layers, plan.unexpected) == ("llama4", 6, ())
    split = SplitCausalLM(*load_split_model(None, CUT, tmp_path))
    ids = torch.tensor([[5, 17, 42, 99, 3]])
    with torch.no_grad():
        assert torch.equal(split(ids).logits, whole.language_model.eval()(input_ids=ids).logits)


def test_another_decoder_in_a_model_of_several() -> None:
    """Where a type leaves the choice, the decoders that were proven are the ones that are split."""
    fields = {"model_type": "llava", "architecture": "LlavaForConditionalGeneration", "text_config": "text_config"}
    remember("llava", Answer(fields, decoders=("llama", "mistral")))
    answer = recall("llava")
    assert answer is not None
    assert answer.decoders == ("llama", "mistral")
    for decoder, possible in (("mistral", True), ("opt", False), (None, True)):
        config = {"text_config": {"num_hidden_layers": 3, **({"model_type": decoder} if decoder else {})}}
        refused = answer.family.impossible_cuts(config)
        assert not refused if possible else "'opt'" in refused[1]
    values = answer.to_dict()
    for wrong in ({"decoders": [1]}, {"decoders": None}):
        with pytest.raises(ValueError, match=r"types of decoder|TypeError"):
            answer_from({**values, **wrong}, "llava")


def test_commands_take_it_as_any_other(saved: Callable[[str], Path], cli: Callable[..., tuple[int, str, str]]) -> None:
    """Plan, verify and the list of plugins; a plan in a new process imports neither torch nor transformers."""
    remember("llama", LLAMA)
    folder = str(saved("llama"))
    cut = ("--split", "2", "4")

    code, out, _ = cli("plan", folder, *cut, "--json")
    assert (code, json.loads(out)["model_type"]) == (0, "llama")
    code, out, err = cli("verify", folder, *cut, "--json")
    assert (code, json.loads(out)["equal"]) == (0, True), err
    code, out, _ = cli("plugins", "--check", "--json")
    (row,) = (row for row in json.loads(out) if row["name"] == "*")
    assert (code, row["status"], row["hooks"]) == (0, "ready", ["splitlearn_family_for"])
    code = (
        "import sys; from splitlearn_core import plan_split; plan_split(sys.argv[1], (2, 4)); "
        "print([name for name in ('torch', 'transformers', 'splitlearn_auto.examining') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_manager_loads_it_here_and_in_a_process(saved: Callable[[str], Path]) -> None:
    """The trunk in a process of its own computes what the one here does."""
    import torch

    remember("llama", LLAMA)
    fields: dict[str, Any] = {"model_type": "llama", "model_path": str(saved("llama")), "split_points": CUT}
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))

    async def main() -> None:
        async with AsyncModelManager() as models:
            for host in ("inline", "process"):
                await models.load_model(ModelConfig(model_id=host, component="trunk", host=host, **fields))
            async with models.lease("inline") as inline, models.lease("process") as process:
                assert torch.equal(await inline(hidden_states=states), await process(hidden_states=states))

    asyncio.run(main())


def test_code_of_a_checkpoint_is_not_run(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Neither while its type is examined nor while it is planned."""
    remember("llama", LLAMA)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in saved("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    load_split_model(None, CUT, folder)
    assert plan_split(folder, CUT).model_type == "llama"
    assert not (tmp_path / "ran").exists()


# -- the manager, while a type is examined ----------------------------------------------------------


class Held:
    """An examination that goes on until it is released or stopped."""

    def __init__(self) -> None:
        self.started, self.released, self.stopped = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, model_type: str, waiting: Callable[[], None]) -> tuple[Answer, bool]:
        try:
            waiting()
            self.started.set()
            while not self.released.wait(0.01):
                waiting()
        except BaseException:
            self.stopped.set()
            raise
        return LLAMA, True


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    examination_held = Held()
    monkeypatch.setattr(any_type, "examine_apart", examination_held)
    return examination_held


@pytest.fixture
def trunk(saved: Callable[[str], Path]) -> ModelConfig:
    return ModelConfig(
        model_id="m", model_type="llama", model_path=str(saved("llama")), component="trunk", split_points=CUT
    )


def test_a_load_shows_the_examination_and_blocks_nothing(held: Held, trunk: ModelConfig) -> None:
    """It is a stage of the load; the event loop answers meanwhile."""

    async def main() -> None:
        async with AsyncModelManager() as models:
            load = asyncio.create_task(models.load_model(trunk))
            await asyncio.to_thread(held.started.wait)
            async with asyncio.timeout(60):
                # The manager takes over the progress of its workers several times a second.
                while models.get_model_info("m").stage != "examining":  # noqa: ASYNC110  # no event shows a stage
                    await asyncio.sleep(0)
            assert models.get_model_info("m").file == "llama"
            held.released.set()
            await load
            assert models.get_model_info("m").ready

    asyncio.run(main())


def test_a_load_is_cancelled_while_a_type_is_examined(held: Held, trunk: ModelConfig) -> None:
    """Nothing is kept, and the next load examines it."""

    async def main() -> None:
        async with AsyncModelManager() as models:
            load = asyncio.create_task(models.load_model(trunk))
            await asyncio.to_thread(held.started.wait)
            await models.cancel_load("m")
            with pytest.raises(LoadCancelledError):
                await load
            assert held.stopped.is_set()
            assert recall("llama") is None
            held.released.set()
            await models.load_model(trunk)

    asyncio.run(main())
    assert recall("llama") == LLAMA


def test_loads_at_the_same_time_examine_a_type_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, and its callback may stop it."""
    held, calls, waiting = Held(), list[str](), threading.Event()

    def examine_once(model_type: str, callback: Callable[[], None]) -> tuple[Answer, bool]:
        calls.append(model_type)
        return held(model_type, callback)

    monkeypatch.setattr(any_type, "examine_apart", examine_once)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(registry().family("llama"))),
        threading.Thread(target=lambda: found.append(registry().family("llama", lambda _: waiting.set()))),
    ]
    threads[0].start()
    assert held.started.wait(60)
    threads[1].start()
    assert waiting.wait(60)

    def stop(progress: Progress) -> None:
        raise LoadCancelledError("stopped")

    with pytest.raises(LoadCancelledError):
        registry().family("llama", stop)
    held.released.set()
    for thread in threads:
        thread.join()

    assert calls == ["llama"]
    assert found[0] is found[1]


# -- the process of an examination ------------------------------------------------------------------


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that has another process run these lines instead of an examination."""
    monkeypatch.syspath_prepend(str(tmp_path / "child"))

    def replace(source: str) -> None:
        (tmp_path / "child").mkdir(exist_ok=True)
        (tmp_path / "child" / "instead_of_it.py").write_text(source)
        import instead_of_it  # type: ignore[import-not-found]  # just written

        monkeypatch.setattr(examination, "print_answer", instead_of_it.run)

    yield replace
    sys.modules.pop("instead_of_it", None)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def run(name):\n    raise SystemExit(3)", "exit code 3"),
        ("def run(name):\n    raise MemoryError('all of it')", "MemoryError: all of it"),
        ("import os\n\n\ndef run(name):\n    os.kill(os.getpid(), 9)", "by signal SIGKILL"),
        ("def run(name):\n    print('hello')", "exit code 0"),
        ("def run(name):\n    print('[]')", "exit code 0"),
        ('def run(name):\n    print(\'{"answer": {}, "lasts": true}\')', "exit code 0"),
    ],
)
def test_a_process_that_fails_is_no_answer(child: Callable[[str], None], source: str, expected: str) -> None:
    """How it ended and what it said is in the error; nothing is kept."""
    child(source)

    with pytest.raises(ExaminationError, match=expected):
        examine_apart("llama", lambda: None)
    with pytest.raises(UnknownModelTypeError, match="examining it failed: it ended its process") as caught:
        registry().family("llama")
    assert "splitlearn plugins new llama --dry-run" in caught.value.hint
    assert recall("llama") is None


def test_a_process_that_is_no_longer_wanted_ends(child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback is called while it works; what it raises ends the process."""
    child("import threading\n\n\ndef run(name):\n    threading.Event().wait()\n")
    started: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    calls = iter([None, None])

    class StoppedError(Exception):
        pass

    def stop_at_the_third() -> None:
        if next(calls, StoppedError):
            raise StoppedError

    with pytest.raises(StoppedError):
        examine_apart("llama", stop_at_the_third)
    (process,) = started
    assert process.returncode == -signal.SIGKILL


# -- what an examination answers --------------------------------------------------------------------


def answered(monkeypatch: pytest.MonkeyPatch, result: Derived | Exception) -> tuple[Answer, bool]:
    def examine(model_type: str, stated: object) -> Derived:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr("splitlearn_auto.examining.examine", examine)
    return answer_about("llama")


def test_what_is_not_proven_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type of which a question is left, and models with a setting or a dtype in which they differ."""
    fields = dict(LLAMA.fields)
    left = Derived(fields, questions=[Question("norm", "what comes after?", "a factor 2")], dtypes=("float32",))
    answer, lasts = answered(monkeypatch, left)
    assert (answer.refusal, lasts) == ("what comes after? a factor 2", True)
    assert answer.hint.startswith("splitlearn plugins new llama --out DIR")

    narrow = Derived(fields, notes=["in bfloat16: a forward differs by up to 1"], dtypes=("float32",))
    family = answered(monkeypatch, narrow)[0].family
    config = {"num_hidden_layers": 3}
    assert family.impossible_cuts({**config, "dtype": "float32"}) == {}
    for name in ("dtype", "torch_dtype"):
        cuts = family.impossible_cuts({**config, name: "bfloat16"})
        assert cuts == dict.fromkeys((1, 2), "in bfloat16: a forward differs by up to 1")

    setting = UnprovenSetting({"bias": True}, {"bias": False}, "with bias=True: it differs")
    proven = Derived(fields, unproven=[setting], dtypes=("float32", "bfloat16"))
    assert answered(monkeypatch, proven) == (Answer(fields, (setting,)), True)


def test_which_refusals_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are true of the type; not those of a machine without memory, nor of a name that is none."""
    assert answered(monkeypatch, CannotSplitError("no")) == (
        Answer(refusal="no", hint="the manager loads such a model as a whole, with model_type 'huggingface'"),
        True,
    )
    exhausted = CannotSplitError("its code fails")
    exhausted.__cause__ = MemoryError()
    assert answered(monkeypatch, exhausted)[1] is False
    _, lasts = answered(monkeypatch, ConfigurationError("transformers knows no such type", hint="upgrade"))
    assert lasts is False


def test_a_refusal_is_given_on_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason and what to do, as the error of a load."""
    monkeypatch.setattr(
        any_type, "examine_apart", lambda *_: (Answer(refusal="it runs backwards", hint="turn it"), True)
    )
    for _ in range(2):
        with pytest.raises(UnknownModelTypeError) as caught:
            registry().family("llama")
        assert caught.value.message.endswith("refuses it: it runs backwards")
        assert caught.value.hint == "turn it"
        monkeypatch.setattr(any_type, "examine_apart", forbid)


def test_a_type_that_transformers_does_not_have(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Is refused with the nearest names, and not kept: it is whatever a file says."""
    answer, lasts = answer_about("lama")

    assert answer.refusal.endswith("knows no model type 'lama'")
    assert "'llama'" in answer.hint
    assert lasts is False
    monkeypatch.setattr(any_type, "examine_apart", lambda *_: (answer, lasts))
    with pytest.raises(UnknownModelTypeError, match="knows no model type 'lama'"):
        registry().family("lama")
    assert not cache.exists()


def test_a_model_with_an_unproven_setting_is_not_split(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Although its type is."""
    setting = UnprovenSetting({"attention_bias": True}, {"attention_bias": False}, "with a bias it differs")
    remember("llama", Answer(LLAMA.fields, (setting,)))
    config = json.loads((saved("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))

    assert plan_split(saved("llama"), CUT).model_type == "llama"
    with pytest.raises(InvalidSplitError, match="with a bias it differs"):
        plan_split(tmp_path, CUT)


def test_a_corrupt_answer_is_examined_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remember("llama", LLAMA)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    monkeypatch.setattr(any_type, "examine_apart", lambda *_: (LLAMA, True))

    with caplog.at_level(logging.WARNING):
        assert registry().family("llama").model_type == "llama"

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert recall("llama") == LLAMA
