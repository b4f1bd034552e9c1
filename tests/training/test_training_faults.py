"""Bad input is one clear error, on rank 0, and costs nothing that was saved; data is read as it is meant."""

from __future__ import annotations

import errno
import json
import math
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import drivetrain
from drivetrain import Trainer
from drivetrain.config import load_settings
from drivetrain.contracts.recipe import IGNORED, RecipeContext, Samples
from drivetrain.contracts.tracker import RunInfo
from drivetrain.errors import (
    ConfigError,
    DamagedStateError,
    DataError,
    DrivetrainError,
    MissingDependencyError,
    NonFiniteError,
    PluginRefusedError,
    StateNotFoundError,
    StoreError,
    TrainingError,
    UnknownPluginError,
)
from drivetrain.plugins.recipe.pretrain import PretrainRecipe
from drivetrain.plugins.recipe.sft import SftRecipe
from drivetrain.plugins.store.dcp import DcpStore
from drivetrain.plugins.tracker.jsonl import JsonlTracker
from drivetrain.testing.suites.recipe import byte_tokenizer
from drivetrain.training import plotting
from drivetrain.training.claim import claimed
from drivetrain.training.export import export_model
from drivetrain.training.order import SampleOrder, StepShape
from drivetrain.training.pulse import Pulse, Pulses
from drivetrain.training.ranks import Ranks
from drivetrain.training.run import StepResult
from drivetrain.training.saving import RunState
from support.doc_pages import ROOT
from support.training import read_figures, run_settings, train_in_processes

Change = Callable[[dict[str, Any]], None]


def assign(path: str, value: Any) -> Change:
    def change(settings: dict[str, Any]) -> None:
        table = settings
        *parents, last = path.split(".")
        for parent in parents:
            table = table[parent]
        table[last] = value

    return change


CONFIGURATIONS: list[tuple[Change, type[DrivetrainError], str]] = [
    (assign("trainer.stepz", 3), ConfigError, r"unknown setting 'stepz'.*Did you mean 'steps'"),
    (assign("trainer.micro_batch", 0), ConfigError, r"trainer\.micro_batch"),
    (assign("trainer.epochs", 2), ConfigError, "give one of them"),
    (assign("optimizer.schedule.warmup", 9), ConfigError, "longer than the run"),
    (assign("optimizer.groups", [{"match": "*.moe.*"}]), ConfigError, "no trainable parameter has a name"),
    (assign("optimizer.name", "adamq"), UnknownPluginError, "Did you mean 'adamw'"),
    (assign("recipe.length", 5000), ConfigError, r"recipe\.length.*found 5000; allowed: at most 256"),
    (assign("recipe.length", 8), DataError, r"chats\.jsonl:1: the document is longer than a row"),
    (assign("recipe.data", "/surely/not/there.jsonl"), DataError, "No such file"),
    (assign("recipe.data", []), ConfigError, "no data is named"),
    (assign("checkpoint", "offload"), PluginRefusedError, "in the host's memory already"),
    (assign("checkpoint", {"name": "selective", "modules": ["experts"]}), ConfigError, "no module in the layers"),
    (assign("precision", "fp16"), PluginRefusedError, "does not compute in float16"),
    (assign("tracker", {"also": ["tensorbord"]}), UnknownPluginError, "Did you mean 'tensorboard'"),
    (assign("tracker", {"also": ["console", "jsonl"]}), ConfigError, "this tracker is named twice; found 'jsonl'"),
    (assign("optimizer.betas", [0.9, 1]), ConfigError, r"optimizer\.betas: .*from 0 on, below 1"),
    (assign("trainer.resume", "must"), StateNotFoundError, "no saved state to go on from"),
    (assign("store.folder", f"{__file__}/state"), StoreError, r"no state can be saved here.*\.py is no folder"),
    (assign("model", "/surely/no/model"), DrivetrainError, "/surely/no/model"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), CONFIGURATIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_setting_that_can_not_be_is_told(
    model: Path, chats: Path, tmp_path: Path, change: Change, kind: type[DrivetrainError], message: str
) -> None:
    settings = run_settings(model, chats, tmp_path)
    change(settings)
    with pytest.raises(kind, match=message):
        Trainer(**settings).run()
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_both_ranks_end_and_rank_0_alone_tells(model: Path, chats: Path, tmp_path: Path) -> None:
    """A broken line is named once; the exit status is that of an error."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text(chats.read_text() + '{"messages": [\n', encoding="utf-8")
    done = train_in_processes(run_settings(model, broken, tmp_path), tmp_path, 2)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: {broken}:25: the line is not valid JSON")
    assert "set recipe.broken to skip" in errors[0]


def test_a_world_size_that_does_not_divide_a_step(model: Path, chats: Path, tmp_path: Path) -> None:
    """Three samples a step can't be shared out among two ranks; the saved state of before stays."""
    settings = run_settings(model, chats, tmp_path, steps=2, micro_batch=1, batch=3, export=False)
    Trainer(**settings).run()
    saved = sorted(path.name for path in (tmp_path / "state").iterdir())
    done = train_in_processes(settings, tmp_path, 2)
    assert done.returncode == 1
    assert "can't be shared out equally among 2 ranks" in done.stderr
    assert "allowed: a multiple of 2" in done.stderr
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == saved


def _not_allowed(path: Path) -> bytes:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_torn_state_is_named_and_stays(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to remove is told, but not of a state that is whole and may not be read."""
    settings = run_settings(model, chats, tmp_path, steps=3, export=False)
    Trainer(**settings).run()
    (file,) = (tmp_path / "state").rglob("rank-00000.bin")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    settings["trainer"]["steps"] = 4
    with pytest.raises(DamagedStateError, match=r"rank-00000\.bin.*remove the state of step 3 to begin anew"):
        Trainer(**settings).run()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", _not_allowed)
        with pytest.raises(DamagedStateError, match=r"state\.json: .*Permission denied$"):
            Trainer(**settings).run()
    file.unlink()
    with pytest.raises(DamagedStateError, match=r"rank-00000\.bin"):
        Trainer(**settings).run()
    file.write_bytes(whole)
    assert Trainer(**settings).run().steps == 4


def test_the_state_of_another_run_is_refused(model: Path, chats: Path, tmp_path: Path) -> None:
    settings = run_settings(model, chats, tmp_path, steps=3, export=False)
    Trainer(**settings).run()
    settings["trainer"]["seed"] = 1
    with pytest.raises(ConfigError, match="belongs to another run: its seed is 0, and this run's is 1"):
        Trainer(**settings).run()
    settings["trainer"]["seed"] = 0
    settings["recipe"]["train_on"] = "all"
    with pytest.raises(ConfigError, match=r"another run: it was trained on other samples: recipe\.data"):
        Trainer(**settings).run()


def test_a_run_that_begins_anew_does_not_mix_its_states_with_older_ones(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    """Of two runs in one folder the states with higher numbers would stay, and the next run go on from them. Processes
    that their agent starts again go on from what they have saved themselves."""
    settings = run_settings(model, chats, tmp_path, steps=3, export=False)
    Trainer(**settings).run()
    settings["trainer"] |= {"resume": "never", "steps": 2}
    settings["store"] |= {"every": 1, "keep": 1}
    with pytest.raises(ConfigError, match="saved states, up to step 3, among which those of a new run would be lost"):
        Trainer(**settings).run()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000003"]
    settings["trainer"]["steps"] = 4
    pulses = Pulses(tmp_path, timeout_seconds=60.0)
    pulses.reset(1)
    loaded = load_settings(None, settings, origin="argument")
    with pytest.raises(ConfigError, match="saved states"):
        Trainer.from_settings(loaded, pulse=Pulse(tmp_path, 0)).run()
    pulses.reset(1)
    assert len(Trainer.from_settings(loaded, pulse=Pulse(tmp_path, 0)).run().losses) == 1


class _Told(Ranks):
    """Notes what is done by all ranks together."""

    def together(self, what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except StoreError as error:
            raise StoreError(f"told by all: {what}: {error}") from error


def test_a_state_that_one_rank_can_not_read_is_told_by_all(tmp_path: Path) -> None:
    """A machine that does not share the store's folder would else end without a word, and the others wait for it."""
    run = drivetrain.prepare(torch.nn.Linear(2, 2), None, {"store": {"folder": str(tmp_path)}})
    state = RunState(DcpStore(DcpStore.Config(folder=str(tmp_path))), run, _Told(), {})
    with pytest.raises(StoreError, match=r"told by all: reading the saved state: .*no complete state of step 4"):
        state.load(4)


def test_a_folder_belongs_to_one_run_at_a_time(model: Path, chats: Path, tmp_path: Path) -> None:
    """A second one is refused before it writes anything, and may have it once the first is over."""
    settings = run_settings(model, chats, tmp_path, steps=2, export=False)
    with Trainer(**settings).assembled() as work:

        def start_another(result: StepResult, steps: int) -> None:
            with pytest.raises(TrainingError, match="another run is writing to this folder"):
                Trainer(**settings).run()

        work.train(start_another)
    assert [figures["step"] for figures in read_figures(tmp_path)] == [1, 2]
    settings["trainer"]["steps"] = 3
    assert Trainer(**settings).run().steps == 3


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    notes: list[str] = []
    with claimed(tmp_path / "run", notes.append):
        assert (tmp_path / "run").is_dir()
    assert "can't be locked (No locks available)" in notes[0]


def test_a_model_that_can_not_be_written_is_told_and_the_old_one_stays(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    """A full disk, or a file in the way. What is written may be read by whoever may read the folder's other files."""
    settings = run_settings(model, chats, tmp_path, steps=2)
    folder = Trainer(**settings).run().folder
    assert folder is not None
    weights = folder / "model.safetensors"
    assert weights.stat().st_mode == (folder / "config.json").stat().st_mode
    before = weights.stat().st_mtime_ns
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"the model can't be written: .*File too large"):
            Trainer(**settings).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert weights.stat().st_mtime_ns == before
    assert not (folder.parent / ".model-unfinished").exists()
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(TrainingError, match="there is a file of this name"):
        Trainer(**settings).run()


class _OtherFails(Ranks):
    """A rank that is told of another one's failure."""

    def together(self, what: str, work: Callable[[], Any]) -> Any:
        raise TrainingError(f"{what} failed")


def test_no_rank_gathers_a_model_for_which_there_is_no_room(tmp_path: Path) -> None:
    """Rank 0 would not take part, and the others wait in vain."""
    nothing: Any = None  # a model that is asked for its tensors would be an AttributeError
    with pytest.raises(TrainingError, match="making room for the model failed"):
        export_model(tmp_path / "model", nothing, nothing, _OtherFails(1, 2))


def test_a_loss_that_is_not_finite_names_the_module(model: Path, chats: Path, tmp_path: Path) -> None:
    """The parameters are as they were, and nothing was saved after the fault."""
    settings = run_settings(model, chats, tmp_path, steps=3, export=False)
    settings["optimizer"]["schedule"] = {"name": "constant"}
    with Trainer(**settings).assembled() as work:
        network = work.run.prepared.model
        before = network.model.norm.weight.detach().clone()
        network.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
        with pytest.raises(NonFiniteError, match=r"step 1: .*its output in the forward pass of model\.layers\.1\.mlp"):
            work.train()
        assert bool((network.model.norm.weight == before).all())
    assert not (tmp_path / "state").exists()
    assert (tmp_path / "run" / "figures.jsonl").read_text() == ""


# --- reading data ----------------------------------------------------------------------------------------------------


def opened(
    recipe: type[SftRecipe | PretrainRecipe],
    notes: list[str] | None = None,
    template: str | None = None,
    **options: Any,
) -> Samples:
    tokenizer = byte_tokenizer()
    tokenizer = replace(tokenizer, chat_template=template or tokenizer.chat_template)
    note = (lambda text: None) if notes is None else notes.append
    context = RecipeContext(tokenizer, tokenizer.backend.get_vocab_size(), 512, 1, note)
    return recipe(recipe.Config.model_validate({"length": 128, **options})).open(context)


def text_of(ids: Any) -> str:
    return byte_tokenizer().backend.decode([int(token) for token in ids], skip_special_tokens=False)


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


def learnt(samples: Samples) -> str:
    """What the targets of the first sample spell."""
    return text_of(target for target in samples[0].targets if target != IGNORED)


def test_answers_alone_are_learnt_to_their_end(tmp_path: Path) -> None:
    """Each answer from behind the words that ask for it, with the token that ends it; and everything, where asked."""
    data = write(tmp_path / "talk.jsonl", {"messages": TALK})
    assert learnt(opened(SftRecipe, data=str(data))) == "Yes.</s>No.</s>"
    everything = opened(SftRecipe, data=str(data), train_on="all")
    assert learnt(everything) == text_of(everything[0].ids)[len("<s>") :]


def test_a_conversation_may_begin_with_an_answer(tmp_path: Path) -> None:
    """What the template puts in front of it, an instruction of its own say, is no answer."""
    data = write(tmp_path / "talk.jsonl", {"messages": TALK[2:]})
    template = "Be kind. " + str(byte_tokenizer().chat_template)
    assert learnt(opened(SftRecipe, template=template, data=str(data))) == "Yes.</s>No.</s>"
    silent = template.replace("<s>assistant: ", "")
    with pytest.raises(DataError, match=r"talk\.jsonl:1: .*can't be told which tokens are the answer"):
        opened(SftRecipe, template=silent, data=str(data))


def test_prompts_and_texts_are_documents_too(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "2 + 2 = ", "completion": "4"}, {"text": "All of it."})
    samples = opened(SftRecipe, data=str(data), pack=False)
    assert learnt(samples) == "4</s>"
    assert text_of(target for target in samples[1].targets if target != IGNORED) == "ll of it.</s>"


def test_documents_share_rows_and_none_is_cut(tmp_path: Path) -> None:
    """All documents, whole, in fewer rows, none of which is longer than allowed."""
    rows = [{"text": "x" * (5 + 7 * i % 120)} for i in range(200)]
    data = write(tmp_path / "many.jsonl", *rows)
    packed, apart = opened(SftRecipe, data=str(data)), opened(SftRecipe, data=str(data), pack=False)
    lengths = [length for index in range(len(packed)) for length in packed[index].lengths]
    assert sorted(lengths) == sorted(length for index in range(len(apart)) for length in apart[index].lengths)
    assert max(len(packed[index].ids) for index in range(len(packed))) <= 128
    assert len(packed) <= 1.1 * sum(lengths) / 128 + 1, "rows are left half empty"
    assert packed.digest != apart.digest


def test_parquet_is_read_as_jsonl_is(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": TALK}, {"messages": TALK[:3]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = write(tmp_path / "rows.jsonl", *rows)
    found = [opened(SftRecipe, data=str(path)).digest for path in (data, tmp_path / "rows.parquet")]
    assert found[0] == found[1]
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:200])
    with pytest.raises(DataError, match=r"torn\.parquet: the file is no sound parquet"):
        opened(SftRecipe, data=str(tmp_path / "torn.parquet"))


def test_without_pyarrow_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "drivetrain\[parquet\]"'):
        opened(SftRecipe, data=str(tmp_path / "rows.parquet"))


FAULTS = {
    "no JSON": ("{", "not valid JSON"),
    "no object": ("[1]", "must hold a JSON object"),
    "no field": ({"words": "x"}, "none of the known fields"),
    "no text": ({"text": 3}, "'text' must be a text"),
    "half a character": ({"text": "a \ud800"}, "not valid Unicode"),
    "half a character said": ({"messages": [*TALK[1:2], {"role": "assistant", "content": "\ud800"}]}, "valid Unicode"),
    "no content": ({"messages": [*TALK[1:2], {"role": "assistant"}]}, "a message has no content"),
    "no message": ({"messages": []}, "must be a list of messages"),
    "no role": ({"messages": [{"content": "x"}]}, "can't be rendered"),
    "no answer": ({"messages": TALK[:2]}, "nothing to learn"),
    "too long": ({"text": "x" * 500}, "longer than a row"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_line_is_named_or_left_out(tmp_path: Path, fault: str) -> None:
    row, message = FAULTS[fault]
    data = write(tmp_path / "rows.jsonl", {"text": "fine"}, row, {"text": "fine too"})
    with pytest.raises(DataError, match=message) as caught:
        opened(SftRecipe, data=str(data))
    assert caught.value.where == f"{data}:2"
    notes: list[str] = []
    samples = opened(SftRecipe, notes, data=str(data), broken="skip")
    assert sum(len(samples[index].lengths) for index in range(len(samples))) == 2
    assert notes[0].startswith("1 rows of data were left out: ")
    assert f"{data}:2" in notes[0]


def test_nothing_is_left_when_all_is_broken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds nothing to train on"):
        opened(SftRecipe, data=str(write(tmp_path / "rows.jsonl", "{", "{")), broken="skip")
    long = write(tmp_path / "long.jsonl", {"text": "x" * 500})
    with pytest.raises(
        DataError, match=r"nothing to train on.*left out; the first: .*long\.jsonl:1: .*longer than a row"
    ):
        opened(SftRecipe, data=str(long), too_long="skip")


@pytest.mark.parametrize(("too_long", "lengths"), [("cut", [128, 5]), ("skip", [5])])
def test_a_document_that_is_too_long_may_be_cut_or_left_out(tmp_path: Path, too_long: str, lengths: list[int]) -> None:
    """And it is told."""
    data = write(tmp_path / "rows.jsonl", {"text": "x" * 500}, {"text": "fine", "messages": None})
    notes: list[str] = []
    samples = opened(SftRecipe, notes, data=str(data), too_long=too_long, pack=False)
    (note,) = notes
    assert ("1 documents were cut to 128" if too_long == "cut" else f"1 rows of data were left out: {data}:1") in note
    assert [length for index in range(len(samples)) for length in samples[index].lengths] == lengths


@pytest.mark.parametrize("boundaries", [True, False])
def test_a_stream_is_cut_into_rows_and_every_token_is_learnt_once(tmp_path: Path, boundaries: bool) -> None:
    texts = ["one " * 50, "two " * 11, "three " * 40]
    data = write(tmp_path / "rows.jsonl", *({"text": text} for text in texts))
    samples = opened(PretrainRecipe, data=str(data), boundaries=boundaries)
    stream = "</s>".join(texts) + "</s>"
    joined = "".join(text_of(samples[index].ids) for index in range(len(samples)))
    assert stream.startswith(joined)
    assert len(stream.replace("</s>", "!")) - len(joined.replace("</s>", "!")) == 1
    targets = [target for index in range(len(samples)) for target in samples[index].targets]
    # What follows a document's end is no target where documents are apart.
    assert targets.count(IGNORED) == (2 if boundaries else 0)
    assert all(len(samples[index].ids) == 128 for index in range(len(samples) - 1))


# --- the order of samples --------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own() -> None:
    order = SampleOrder(50, seed=3)
    epochs = [[order.index(position) for position in range(50 * e, 50 * e + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [SampleOrder(50, seed=3).index(position) for position in (99, 3, 60)] == [
        epochs[1][49],
        epochs[0][3],
        epochs[1][10],
    ]
    assert [SampleOrder(4, seed=0, shuffle=False).index(position) for position in range(6)] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_has_the_same_samples_for_any_number_of_ranks(world_size: int) -> None:
    shape = StepShape(2, 8 // (2 * world_size), world_size)
    positions = [
        position
        for rank in range(world_size)
        for index in range(shape.accumulate)
        for position in shape.positions(24, rank, index)
    ]
    assert sorted(positions) == list(range(24, 32))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_draws_a_run(model: Path, chats: Path, tmp_path: Path, cli: Any) -> None:
    """train prints the model's folder, and plot the picture's."""
    pytest.importorskip("matplotlib")
    settings = run_settings(model, chats, tmp_path, steps=3)
    (tmp_path / "run.yaml").write_text(json.dumps(settings), encoding="utf-8")
    trained = cli("train", tmp_path / "run.yaml", "--set", "tracker.also=[console]")
    assert trained.status == 0, trained.err
    assert trained.out.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert trained.out.startswith("step 1/3: loss ")
    assert "recipe      sft" in trained.err
    drawn = cli("plot", tmp_path / "run")
    assert drawn.status == 0, drawn.err
    picture = Path(drawn.out.strip())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli("plot", tmp_path).status == 1


def test_tensorboard_reads_what_is_written(model: Path, chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = run_settings(model, chats, tmp_path, steps=3, export=False)
    Trainer(**settings, tracker="tensorboard").run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_options_of_the_launch_are_checked(cli: Any, model: Path) -> None:
    assert "HOST:PORT" in cli("train", "--model", model, "--nnodes", "1:2").error
    assert "not a number of machines" in cli("train", "--model", model, "--nnodes", "2:1").error
    assert "no model is named" in cli("train").error


def test_the_example_of_the_pages_is_the_file() -> None:
    """What the walk-through shows is what it runs, and the data is whole."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = page.partition("```yaml ship-clerk.yaml\n")[2].partition("```")[0]
    file = (ROOT / "docs" / "examples" / "sft-smollm2.yaml").read_text(encoding="utf-8")
    assert "".join(line for line in file.splitlines(keepends=True) if not line.startswith("#")) == shown
    rows = [json.loads(line) for line in (ROOT / "docs/examples/ship-clerk.jsonl").read_text().splitlines()]
    assert len(rows) == 229
    answers = [row["messages"][1]["content"] for row in rows]
    assert all(answer.startswith("Ahoy! ") and answer.endswith(" Fair winds!") for answer in answers)


def test_a_figure_that_json_can_not_hold_leaves_the_line_one_of_json(tmp_path: Path) -> None:
    """The norm of a step that overflowed is infinite; other programs read the file too, and so does plot."""
    tracker = JsonlTracker(JsonlTracker.Config())
    tracker.start(RunInfo(tmp_path, steps=1))
    tracker.record(1, {"loss": 2.5, "grad_norm": float("inf")})
    tracker.finish("done")
    path = tmp_path / "figures.jsonl"
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": 2.5, "grad_norm": None}
    (row,) = plotting.read_figures(path)
    assert math.isnan(row["grad_norm"])
