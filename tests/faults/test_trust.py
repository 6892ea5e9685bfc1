"""Fault 25: model folders, tokenizers and checkpoints of strangers. Nothing of them runs, and each gets its error.

The attacks are files of `hostile.py`; what they may do is create the file `ran`. Every command has "y" on its standard
input, for whoever asks there whether code may run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.errors import CheckpointError, DataError, MissingError
from gptcli.files import fingerprint
from tests.conftest import Cli, make_project
from tests.faults import hostile
from tests.faults.hostile import Attack, Pickled, fifo, linked, sized, tensor, weights, written
from tests.tiny import save_model
from tests.warm import MB, Ended, Warm

DAMAGED, NOTHING, DATA = (error.exit_code for error in (CheckpointError, MissingError, DataError))
RECIPE = """\
data: {train: text.txt, validation: {tail: 10%}, sequence_length: 16}
train: {max_steps: 2, global_batch_size: 2, precision: fp32, save_every: 100}
"""
COMMANDS = {
    "generate": ("generate", "strange", "--prompt", "hello", "--greedy", "--max-new-tokens", "4", "--json", "--quiet"),
    "eval": ("eval", "strange", "--data", "text.txt", "--json", "--quiet"),
    "pretrain": ("pretrain", "r.yaml", "model.from=strange", "--json", "--quiet"),
}
YES = b"y\ny\ny\n"


def slow(*values: Any) -> Any:
    """A case for --all-faults."""
    return pytest.param(*values, marks=pytest.mark.slow_fault)


@dataclass(frozen=True)
class Place:
    """A folder with a recipe, a text and a model `strange`; `ran` appears when code of a stranger runs."""

    folder: Path
    warm: Warm

    @property
    def model(self) -> Path:
        return self.folder / "strange"

    @property
    def ran(self) -> Path:
        return self.folder / "ran"

    def run(self, *arguments: str, **options: Any) -> Ended:
        cache = str(self.folder / "cache")
        return self.warm(*arguments, cwd=self.folder, stdin=YES, GPTCLI_CACHE=cache, **options)

    def refused(self, code: int, said: str, *arguments: str) -> None:
        """A command ends with an error of a few lines, and nothing ran."""
        done = self.run(*arguments)
        assert not self.ran.exists()
        assert done.code == code, done.err
        assert_error(done, said)


def assert_error(done: Any, said: str) -> None:
    assert said in done.err
    assert "Traceback" not in done.err
    assert 1 <= len(done.err.splitlines()) <= 8
    assert done.err.startswith("error: ")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_model(folder / "strange")
    (folder / "text.txt").write_text("The cat sat on the mat. " * 200)
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path, warm: Warm) -> Place:
    return Place(Path(shutil.copytree(good, tmp_path / "place")), warm)


ABSURD = 1_000_000_000
REFUSED: dict[str, tuple[Attack, int, str]] = {
    # Weights that are no safetensors.
    "pickle": (hostile.pickle_only, NOTHING, "only pytorch_model.bin"),
    "pickle named by config.json": (hostile.named_pickle, DAMAGED, "names 'pytorch_model.bin' as weights"),
    "pickle in the index": (hostile.indexed_pickle, DAMAGED, "names 'weights.bin' as weights"),
    "tensors in a pickle in the index": (hostile.indexed_tensors, DAMAGED, "names 'weights.bin' as weights"),
    "pickle in another index": (hostile.other_index, DAMAGED, "names 'weights.bin' as weights"),
    "index out of the folder": (hostile.index_outside, DAMAGED, "names '../outside.safetensors'"),
    "adapter beside a model": (hostile.beside_an_adapter, DAMAGED, "a whole model and an adapter"),
    "adapter of another folder": (hostile.adapter_of_another, NOTHING, "adapter"),
    # Code.
    "model code": (hostile.model_code, NOTHING, "its own Python code, which is not run"),
    "model code of another path": (hostile.model_code_elsewhere, NOTHING, "its own Python code, which is not run"),
    "kernel": (hostile.kernel, NOTHING, "kernel 'stranger/kernel' of the Hub, which is code and is not run"),
    # Headers that lie.
    "no header": (weights({}, b"", length=0), DAMAGED, "header"),
    "header of 2^63 bytes": (weights({}, length=2**63), DAMAGED, "header"),
    "header beyond the file": (weights({}, length=90_000_000), DAMAGED, "header"),
    "tensor beyond the file": (weights({"a": tensor(0, 4 * 10**12, 10**6, 10**6)}), DAMAGED, "header"),
    "overlapping tensors": (weights({"a": tensor(0, 8, 2), "b": tensor(4, 12, 2)}), DAMAGED, "header"),
    "wrong shape": (weights({"a": tensor(0, 16, 1000)}), DAMAGED, "header"),
    "shape that overflows": (weights({"a": tensor(0, 16, 2**63, 2**63)}), DAMAGED, "header"),
    "negative offset": (weights({"a": tensor(-16, 0, 4)}), DAMAGED, "header"),
    # Sizes that would take all memory, or all time.
    "layers": (sized(num_hidden_layers=ABSURD), DAMAGED, "num_hidden_layers is 1,000,000,000"),
    "layers of a type that lists them": (
        sized(num_hidden_layers=ABSURD, model_type="qwen3"),
        DAMAGED,
        "num_hidden_layers is 1,000,000,000",
    ),
    "layers less than none": (sized(num_hidden_layers=-1), DAMAGED, "num_hidden_layers is -1"),
    "inner layers": (sized(text_config={"num_hidden_layers": ABSURD}), DAMAGED, "num_hidden_layers"),
    "experts": (sized(num_local_experts=ABSURD, model_type="mixtral"), DAMAGED, "num_local_experts"),
    "width": (sized(hidden_size=ABSURD), DAMAGED, "hidden_size is 1,000,000,000"),
    "a number of 31 digits": (sized(vocab_size=10**30), DAMAGED, "vocab_size is a number of 31 digits"),
    "parameters": (sized(intermediate_size=10_000_000), DAMAGED, "parameters, and the weights have"),
    "vocabulary": (sized(vocab_size=10_000_000), DAMAGED, "parameters, and the weights have"),
    "positions": (
        sized(model_type="gpt2", max_position_embeddings=ABSURD),
        DAMAGED,
        "parameters, and the weights have",
    ),
    "another shape": (sized(intermediate_size=48), DAMAGED, "have other shapes than config.json says"),
    # Files that are none, and JSON that is none.
    "waiting config": (fifo("config.json"), NOTHING, "it has no config.json"),
    "endless weights": (linked("model.safetensors", "/dev/zero"), NOTHING, "no weights in this folder"),
    "deep config": (written("config.json", "[" * 100_000), DAMAGED, "damaged: not a JSON object"),
    "types": (sized(model_type=["llama"]), DAMAGED, "cannot be loaded"),
}

RUNS_CODE = list(REFUSED)[:11]


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_model_is_refused_with_its_code_and_nothing_runs(place: Place, name: str) -> None:
    attack, code, said = REFUSED[name]
    attack(place.model, place.ran)
    for command in COMMANDS if name in RUNS_CODE else ("generate", "pretrain"):
        place.refused(code, said, *COMMANDS[command])


# What is hostile and not used: the result is that of the good folder.
IGNORED: dict[str, Attack] = {
    "pickles beside the weights": hostile.pickles_beside,
    "code of a known type": hostile.known_model_code,
    "ways to generate": hostile.custom_generation,
    "waiting files": fifo("generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    "link to weights elsewhere": linked("model.safetensors", "{outside}/model.safetensors"),
    "no tokenizer class": hostile.unknown_tokenizer,
}
PRETRAINED = ("pickles beside the weights", "code of a known type")


@pytest.fixture(scope="module")
def expected(good: Path, tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> dict[str, Any]:
    """What the good folder gives."""
    place = Place(Path(shutil.copytree(good, tmp_path_factory.mktemp("expected") / "place")), warm)
    return {command: place.run(*COMMANDS[command]).json() for command in ("generate", "eval")}


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_hostile_and_not_needed_changes_nothing(place: Place, expected: dict[str, Any], name: str) -> None:
    IGNORED[name](place.model, place.ran)
    for command, result in expected.items():
        done = place.run(*COMMANDS[command])
        assert (done.code, done.err) == (0, "")
        assert done.json() == result
    if name in PRETRAINED:
        assert place.run(*COMMANDS["pretrain"]).code == 0
    assert not place.ran.exists()


TOKENIZERS: dict[str, tuple[Attack, int, str]] = {
    "code": (hostile.slow_tokenizer_code, NOTHING, "its own Python code, which is not run"),
    "pickle": (hostile.pickled_tokenizer, DATA, "tokenizer.json is not a tokenizer"),
    "deep": (written("tokenizer_config.json", "[" * 100_000), DATA, "tokenizer_config.json is not JSON"),
    "list": (written("tokenizer_config.json", "[1]"), DATA, "tokenizer_config.json is not a JSON object"),
    "waiting": (fifo("tokenizer.json"), NOTHING, "holds no tokenizer"),
    "endless": (linked("tokenizer.json", "/dev/zero"), NOTHING, "holds no tokenizer"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused_with_its_code_and_nothing_runs(place: Place, name: str) -> None:
    attack, code, said = TOKENIZERS[name]
    attack(place.model, place.ran)
    place.refused(code, said, "tokenize", "r.yaml", "tokenizer.from=strange", "--quiet")
    place.refused(code, said, *COMMANDS["pretrain"])
    done = place.run(*COMMANDS["generate"])  # by transformers, which has its own words
    assert done.code in (DAMAGED, NOTHING)
    assert_error(done, "tokenizer")
    assert not place.ran.exists()


def test_of_a_tokenizer_with_code_only_its_data_is_used(place: Place) -> None:
    hostile.tokenizer_code(place.model, place.ran)
    place.refused(NOTHING, "its own Python code, which is not run", *COMMANDS["generate"])
    for command in (COMMANDS["eval"], COMMANDS["pretrain"], ("tokenize", "r.yaml", "tokenizer.from=strange")):
        done = place.run(*command)
        assert done.code == 0, done.err
    assert not place.ran.exists()
    final = json.loads((place.folder / "runs" / "r" / "final" / "tokenizer_config.json").read_text())
    assert "auto_map" not in final


def test_a_link_in_a_tokenizer_does_not_carry_a_file_of_the_user_into_the_trained_model(place: Place) -> None:
    (place.folder / "secret").write_text("a key")
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (place.model / name).symlink_to(place.folder / "secret")
        place.refused(DATA, f"{name} of the tokenizer", *COMMANDS["pretrain"])
        (place.model / name).unlink()


def test_a_chat_template_is_never_run_and_transformers_renders_it_in_a_sandbox(place: Place) -> None:
    """gptcli itself renders none yet; what `apply_chat_template` does with one is held here for when it does."""
    from jinja2.exceptions import SecurityError

    from gptcli.model.load import load_tokenizer

    classes = "().__class__.__base__.__subclasses__()"
    reach = f"{{% for c in {classes} %}}{{% if 'Popen' in c.__name__ %}}{{{{ c(['touch', '{place.ran}']) }}}}"
    (place.model / "chat_template.jinja").write_text(reach + "{% endif %}{% endfor %}")
    for command in COMMANDS.values():
        done = place.run(*command)
        assert done.code == 0, done.err
    with pytest.raises(SecurityError):
        load_tokenizer(place.model).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not place.ran.exists()


@pytest.mark.parametrize("command", ["plan", "pretrain", slow("finetune")])
def test_code_of_a_model_runs_only_where_the_recipe_trusts_it(place: Place, command: str) -> None:
    hostile.model_code(place.model, place.ran)
    arguments = (command, "r.yaml", "model.from=strange", "--quiet")
    place.refused(NOTHING, "model.trust_remote_code: true", *arguments)
    place.refused(NOTHING, "model.trust_remote_code: true", *arguments, "model.trust_remote_code=false")
    done = place.run(*arguments, "model.trust_remote_code=true")
    assert done.code == 0, done.err
    assert place.ran.exists()
    place.ran.unlink()
    if command != "plan":
        final = place.folder / "runs" / "r" / "final"
        assert "auto_map" in json.loads((final / "config.json").read_text())
        place.refused(NOTHING, "its own Python code", "generate", "r", "--prompt", "x", "--quiet")


# The state of a run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A run of 8 steps with checkpoints at 4 and 8."""
    folder = make_project(tmp_path_factory.mktemp("trained"))
    done = warm("pretrain", "tiny.yaml", "--quiet", cwd=folder, GPTCLI_CACHE=str(folder / "cache"))
    assert done.code == 0, done.err
    return folder


@dataclass(frozen=True)
class Run:
    """The copy of a run, of which the newest checkpoint is attacked."""

    place: Place
    checkpoint: Path

    def resume(self) -> Ended:
        return self.place.run("pretrain", "tiny.yaml", "train.max_steps=10", "--json")

    def sign(self) -> None:
        """Write the manifest anew, as an attacker can."""
        path = self.checkpoint / "MANIFEST.json"
        manifest = json.loads(path.read_text())
        for name in manifest["files"]:
            raw = (self.checkpoint / name).read_bytes()
            manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        del manifest["fingerprint"]
        path.write_text(json.dumps({**manifest, "fingerprint": fingerprint(manifest)}))


@pytest.fixture
def run(trained: Path, tmp_path: Path, warm: Warm) -> Run:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    return Run(Place(folder, warm), folder / "runs" / "tiny" / "checkpoint-8")


STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("name", STATE)
def test_a_pickle_in_a_checkpoint_is_passed_over_by_its_hash(run: Run, name: str) -> None:
    torch.save(Pickled(run.place.ran), run.checkpoint / name)
    done = run.resume()
    assert done.code == 0, done.err
    assert f"checkpoint-8 is passed over: {name}" in done.err
    assert "from checkpoint-4" in done.err
    assert not run.place.ran.exists()


@pytest.mark.parametrize("name", STATE)
def test_a_pickle_under_a_right_manifest_is_code_4_and_does_not_run(run: Run, name: str) -> None:
    torch.save(Pickled(run.place.ran), run.checkpoint / name)
    run.sign()
    done = run.resume()
    assert not run.place.ran.exists()
    assert done.code == DAMAGED, done.err
    error = done.err[done.err.index("error: ") :]
    assert "holds other objects than numbers and tensors, of which nothing was run" in error
    assert f"rm -r {run.checkpoint}" in error
    assert "Traceback" not in done.err and len(error.splitlines()) <= 8
    shutil.rmtree(run.checkpoint)
    assert run.resume().code == 0, "what the error says to do"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", [1]),
        slow("optimizer.pt", {"state": {}, "param_groups": []}),
        slow("scheduler.pt", [1]),
        ("rng_state.pth", {}),
        ("trainer_state.json", "[1]"),
        slow("trainer_state.json", "{"),
        ("model.safetensors", "short"),
    ],
    ids=str,
)
def test_state_of_another_kind_under_a_right_manifest_is_code_4(run: Run, name: str, content: Any) -> None:
    if isinstance(content, str):
        (run.checkpoint / name).write_text(content)
    else:
        torch.save(content, run.checkpoint / name)
    run.sign()
    done = run.resume()
    assert done.code == DAMAGED, done.err
    error = done.err[done.err.index("error: ") :]
    assert "cannot be restored" in error
    assert "Traceback" not in done.err and len(error.splitlines()) <= 8


@pytest.mark.parametrize("name", ["scaler.pt", "rng_state_0.pth"])
def test_a_file_that_the_manifest_does_not_name_is_not_read_and_the_checkpoint_passed_over(run: Run, name: str) -> None:
    torch.save(Pickled(run.place.ran), run.checkpoint / name)
    done = run.resume()
    assert done.code == 0, done.err
    assert f"checkpoint-8 is passed over: {name} is none of its files" in done.err
    assert not run.place.ran.exists()


@pytest.mark.parametrize("name", ["training_args.bin", slow("pytorch_model.bin"), slow("optimizer.bin")])
def test_files_that_no_checkpoint_of_ours_has_are_not_opened(run: Run, name: str) -> None:
    torch.save(Pickled(run.place.ran), run.checkpoint / name)
    done = run.resume()
    assert done.code == 0, done.err
    assert not run.place.ran.exists()


def test_the_real_command_refuses_what_would_ask(place: Place, run_cli: Cli) -> None:
    """Without a fork: `python -m gptcli`, for the two attacks by which something could run."""
    hostile.slow_tokenizer_code(place.model, place.ran)
    done = run_cli(*COMMANDS["eval"], cwd=place.folder, stdin="y\ny\n")
    assert done.code == NOTHING, done.err
    assert_error(done, "its own Python code, which is not run")
    assert not place.ran.exists()


def test_absurd_sizes_take_little_memory(place: Place) -> None:
    sized(intermediate_size=10_000_000)(place.model, place.ran)
    before = place.run("generate", "nothing", "--prompt", "x").peak
    assert place.run(*COMMANDS["generate"]).peak < before + 100 * MB
