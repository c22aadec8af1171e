"""Two and three processes (gloo on the CPU) train and validate as one does, under DistributedDataParallel and FSDP."""

import json
import math
from functools import partial

import pytest
import torch
from huggingface_hub import HfApi

from tests.faults import ranks
from tests.invariants import processes
from tests.invariants.tiny import assert_same_step
from vlmcap.miniature.scenes import write_scene_dataset


@pytest.fixture
def compare(pictures, tmp_path):
    """compare(function, ranks, ...): losses, scores and first gradients of several processes, and of one process that
    accumulates as many batches. Returns the result of the several."""

    def compare(function, count: int, alone=None, **settings) -> dict:
        log = tmp_path / "log"
        accumulated = settings.pop("gradient_accumulation_steps", 1)
        several = settings | {"gradient_accumulation_steps": accumulated}
        statuses = ranks.run_ranks(count, function, pictures, tmp_path / "several.pt", several, log=log)
        assert statuses == [0] * count, ranks.tail(log)
        single = settings | {"gradient_accumulation_steps": accumulated * count}
        assert ranks.run(alone or function, pictures, tmp_path / "one.pt", single, log=log) == 0, ranks.tail(log)
        result, one = (torch.load(tmp_path / name) for name in ("several.pt", "one.pt"))
        assert result["losses"] == pytest.approx(one["losses"][: len(result["losses"])], rel=1e-5, abs=1e-6)
        first = ((run["losses"][0], run["gradients"]) for run in (result, one))
        assert_same_step(*first, loss_tolerance=1e-5)
        for several, alone in zip(result["scores"], one["scores"], strict=True):
            assert several == pytest.approx(alone, rel=1e-5)
        return result

    return compare


# With three captions at a time the six pictures are ten examples, with seven they are six.
@pytest.mark.parametrize(
    ("count", "captions", "batch", "accumulated"),
    [
        (2, 7, 1, 3),  # one step an epoch
        (3, 3, 1, 1),  # the last step of an epoch has one example, so that two processes have none
        (3, 3, 1, 2),  # its last accumulation is shorter
        (2, 3, 3, 1),  # the last batch is shorter: 3 and 1 examples
        (3, 3, 2, 2),
    ],
)
def test_ddp_is_one_process(compare, count, captions, batch, accumulated):
    """Each example has its own number of captions and lengths: the loss is a mean over the tokens of all of them, in
    every step of several epochs, and no example counts twice in the last one."""
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    result = compare(processes.train, count, captions_per_image=captions, **settings)
    assert result["wrapper"] == "DistributedDataParallel" and len(result["losses"]) == 6
    assert not math.isclose(result["losses"][0], result["losses"][-1], rel_tol=1e-2), "it has learned nothing"


def test_one_caption_a_sequence_in_ddp_is_one_process(compare):
    settings = {"per_device_train_batch_size": 1, "captions_per_image": 3, "shared_prefix": False}
    compare(processes.train, 3, **settings)


@pytest.mark.parametrize(("count", "batch"), [(2, 4), (3, 2)])
def test_captioners_in_ddp_are_one_process(compare, count, batch):
    """23 captions, a caption an example; five validation images, unequal shares of images and of their captions."""
    result = compare(processes.train_captioner, count, per_device_train_batch_size=batch)
    assert result["wrapper"] == "DistributedDataParallel" and len(result["scores"]) == 3


@pytest.mark.parametrize(("count", "batch", "accumulated"), [(2, 1, 3), (3, 2, 1)])
def test_training_on_rewards_in_ddp_is_one_process(compare, count, batch, accumulated):
    """The same samples, advantages (by the deviation of all processes' rewards) and losses, two steps on each."""
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    result = compare(processes.train_on_rewards, count, num_iterations=2, beta=0.1, **settings)
    assert result["wrapper"] == "DistributedDataParallel" and len(result["scores"]) == 2


@pytest.mark.parametrize(("count", "batch"), [(2, 1), (3, 2)])
def test_preferences_in_ddp_are_one_process(compare, count, batch):
    """Nine examples of one or two pairs: the loss is a mean over the pairs of all processes, and every process has the
    log-probabilities of the reference that any of them computed."""
    result = compare(processes.train_preferences, count, per_device_train_batch_size=batch)
    assert result["wrapper"] == "DistributedDataParallel" and len(result["scores"]) == 3
    assert not math.isclose(result["losses"][0], result["losses"][-1], rel_tol=1e-2), "it has learned nothing"


@pytest.mark.parametrize("count", [2, 3])
def test_fsdp_is_one_process(compare, count):
    """FSDP2 as accelerate builds it from accelerate_configs/fsdp_qlora.yaml, uneven batches included."""
    settings = {"per_device_train_batch_size": 1, "captions_per_image": 3}
    result = compare(processes.train_sharded, count, alone=processes.train, **settings)
    assert result["wrapper"] == "FSDPPeftModelForCausalLM" and len(result["losses"]) == 6


@pytest.mark.parametrize("count", [2, 3])
def test_a_sharded_step_is_one_process(compare, count):
    """The forward goes through the wrapped model, so that FSDP gathers what it needs and scatters the gradients."""
    settings = {"per_device_train_batch_size": 6 // count, "captions_per_image": 7, "max_steps": 1}
    result = compare(processes.step_sharded, count, alone=processes.train, **settings)
    assert result["wrapper"] == "FSDPPeftModelForCausalLM"


@pytest.mark.parametrize("count", [2, 3])
def test_every_validation_image_is_captioned_once(pictures, tmp_path, count):
    """Five images; every process returns the scores of all of them, which are those of one process."""
    log, settings = tmp_path / "log", {"images": 5}
    output = pictures, tmp_path / "result", settings
    assert ranks.run_ranks(count, processes.validate, *output, log=log) == [0] * count, ranks.tail(log)
    several = [torch.load(f"{tmp_path / 'result'}.{rank}") for rank in range(count)]
    assert sorted(image for result in several for image in result["asked"]) == list(range(5))
    assert ranks.run(processes.validate, *output, log=log) == 0, ranks.tail(log)
    alone = torch.load(f"{tmp_path / 'result'}.0")
    assert len(alone["asked"]) == 5 and all(result["scores"] == alone["scores"] for result in several)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, miniature_dir, repo_root):
    """A published dataset of drawn scenes: 7 images to train on, 3 to validate, 5 to test."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scene_dataset(folder, train=11, validation=3, test=5)
    command = [repo_root / "scripts/publish_datasets.py", "--source", "stair", "--tokenizer", miniature_dir]
    command += ["--annotations", folder / "stair_train.json", folder / "stair_val.json", "--images", folder / "images"]
    command += ["--yj_annotations", folder / "yj.json", "--val_ids", folder / "val_ids.txt"]
    command += ["--test_ids", folder / "test_ids.txt", "--output_dir", folder / "dataset"]
    log = folder / "log"
    assert ranks.run(processes.script, *map(str, command), log=log) == 0, ranks.tail(log)
    return folder / "dataset"


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp_qlora.yaml"])
def test_the_recipe_is_that_of_one_process(hub, dataset, repo_root, miniature_dir, tmp_path, monkeypatch, sharded):
    """Losses, captions and scores are equal; one process prints, writes and pushes."""
    monkeypatch.setenv("VLMCAP_METEOR_JAR", "none.jar")  # Java would take seconds
    config = repo_root / "recipes/configs/sft_qwen2vl_jp/demo.yaml"
    command = [repo_root / "recipes/sft_qwen2vl_jp.py", "--config", config, "--dataset", dataset, "--push_to_hub"]
    command += ["--instances", dataset.parent / "instances.json"]
    command += ["--model_name_or_path", miniature_dir, "--load_in_4bit", "false"]
    command += ["--max_steps", 4, "--logging_steps", 1, "--save_steps", 2, "--eval_steps", 2, "--lora_dropout", 0]
    command += ["--max_new_tokens", 12, "--warmup_steps", 0, "--use_cpu", "--per_device_train_batch_size", 2]
    if sharded:
        command += ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
    found = {}
    for count in (1, 2):
        folder, log, repo = tmp_path / str(count), tmp_path / f"{count}.log", f"user/processes-{count}"
        own = ["--output_dir", folder, "--hub_model_id", repo, "--gradient_accumulation_steps", 2 // count]
        program = partial(processes.script, *map(str, command + own), sharded=sharded and count > 1)
        statuses = ranks.run_ranks(count, program, log=log)
        assert statuses == [0] * count, ranks.tail(log)
        metrics = json.loads((folder / "adapter/metrics.json").read_text(encoding="utf-8"))
        said = [(folder / part / "predictions.jsonl").read_bytes() for part in ("base", "adapter")]
        entries = [
            {k: v for k, v in e.items() if "seconds" not in k and k != "epoch"} for e in metrics["training"]["log"]
        ]
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        commits = [commit.title for commit in HfApi().list_repo_commits(repo)]
        text = log.read_text(errors="replace")
        assert f"4 images a step (2 a device x {2 // count} accumulated x {count} process" in text.replace("\n", "")
        prints = [text.count(words) for words in ("Trainable modules of", "BLEU-4 ", "Pushed to http")]
        found[count] = metrics["scores"], said, entries, files, commits, prints
    one, two = found[1], found[2]
    assert two[0] == pytest.approx(one[0], rel=1e-9) and two[1] == one[1]
    assert len(one[1][0].splitlines()) == 5
    for ours, theirs in zip(two[2], one[2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    own = {"rng_state_0.pth", "rng_state_1.pth"} | ({"pytorch_model_fsdp.bin", "optimizer.bin"} if sharded else set())
    assert set(two[3]) - set(one[3]) == {f"checkpoint-4/{name}" for name in own}
    assert two[4] == one[4] and two[5] == one[5] == [1, 1, 1]
