"""READMEs and the notebook: links resolve; every command exists, takes its options, and is run by a test."""

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not any(part.startswith(".") or part in ("outputs", "build") for part in path.relative_to(ROOT).parts)
)
NOTEBOOK = ROOT / "recipes/colab_t4.ipynb"
LINK = re.compile(r"\]\(([^)\s]+)\)")
# What runs each program that a README shows: a test, or the make target that CI's demo tests stand for.
RUN_BY = {
    "recipes/sft_qwen2vl_jp.py": "tests/recipes/test_round_trip.py",
    "recipes/dpo_qwen2vl_jp.py": "tests/recipes/test_dpo_qwen2vl_jp.py",
    "recipes/grpo_qwen2vl_jp.py": "tests/recipes/test_grpo_qwen2vl_jp.py",
    "recipes/sft_blip_vi.py": "tests/recipes/test_sft_blip_vi.py",
    "recipes/sft_vit_gpt2_food.py": "tests/recipes/test_sft_vit_gpt2_food.py",
    "recipes/sft_vit_llama_food.py": "tests/recipes/test_sft_vit_llama_food.py",
    "scripts/audit_captions.py": "tests/evaluation/test_audit.py",
    "scripts/bench_data.py": None,  # a benchmark of minutes
    "scripts/bench_metrics.py": "tests/experiments/test_bench_metrics.py",
    "scripts/bench_time_to_quality.py": None,  # a benchmark of an hour
    "scripts/bench_training.py": "tests/experiments/test_bench.py",
    "scripts/caption.py": "tests/captioning/test_caption_script.py",
    "scripts/compare_runs.py": "tests/reporting/test_compare.py",
    "scripts/eval_captioning.py": "tests/evaluation/test_eval_script.py",
    "scripts/export_model.py": "tests/steps/test_export.py",
    "scripts/fetch_images.py": "tests/data/test_fetch.py",
    "scripts/gpu_check.py": "tests/experiments/test_gpu_check.py",
    "scripts/hold_out_captions.py": "tests/evaluation/test_eval_script.py",
    "scripts/human_eval.py": "tests/human/test_human.py",
    "scripts/infer_baseline.py": "tests/captioning/test_baselines_script.py",
    "scripts/language_table.py": "tests/experiments/test_language_table.py",
    "scripts/publish_datasets.py": "tests/recipes/test_round_trip.py",
    "scripts/publish_metric.py": "tests/evaluation/test_metric_space.py",
    "scripts/publish_space.py": "tests/reporting/test_caption_space.py",
    "scripts/push_adapter.py": "tests/reporting/test_push.py",
    "scripts/push_dataset.py": "tests/data/test_publish.py",
    "scripts/rehearse.py": "tests/recipes/test_rehearsal.py",
    "scripts/reward_table.py": "tests/experiments/test_reward_table.py",
    "scripts/run_ablation.py": "tests/experiments/test_ablation_script.py",
    "scripts/serve_check.py": "tests/experiments/test_serving.py",
}
OTHER_PROGRAMS = ("make", "sbatch", "sky", "source", ".venv/bin/python", "pip", "git", "transformers", "vllm")
OTHER_PROGRAMS += ("llama.cpp/convert_hf_to_gguf.py", "llama-mtmd-cli")


def shell(path: Path) -> list[str]:
    """The blocks of shell of a README, or the lines of a notebook that begin with `!`, in a block a cell."""
    text = path.read_text(encoding="utf-8")
    if path != NOTEBOOK:
        return re.findall(r"```bash\n(.*?)```", text, re.S)
    sources = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return ["\n".join(re.findall(r"^ *!((?:.*\\\n)*.*)$", source, re.M)) for source in sources]


def commands() -> list[tuple[str, list[str]]]:
    """(file, words) of every command in a block of shell; continued lines are one, comments are none."""
    found = []
    for path in (*READMES, NOTEBOOK):
        for block in shell(path):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    if words := shlex.split(part, comments=True):
                        found.append((str(path.relative_to(ROOT)), words))
    return found


def program(words: list[str]) -> str | None:
    """The recipe or script of the clone that a command starts."""
    for word in words:
        if re.fullmatch(r"(recipes|scripts)/\w+\.py", word):
            return word
        if found := re.fullmatch(r"vlmcap\.(recipes|scripts)\.(\w+)", word):
            return f"{found[1]}/{found[2]}.py"
    return None


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_resolves(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if target.startswith(("https://", "http://")):
            continue
        linked = (path.parent / target) if target else path
        assert linked.exists(), f"{path.relative_to(ROOT)}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings], link


def test_every_command_exists_and_takes_its_options(run_script):
    @cache
    def options(name: str) -> set[str]:
        return set(re.findall(r"--\w+", run_script(name.removeprefix("scripts/"), "--help").stdout))

    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert len(commands()) > 30
    assert sum(readme == "recipes/colab_t4.ipynb" for readme, _ in commands()) == 8
    for readme, words in commands():
        name = program(words)
        if words[0] == "make":
            assert words[1] in targets, (readme, words)
        if name is None:
            assert words[0] in OTHER_PROGRAMS, (readme, words)
            continue
        assert (ROOT / name).is_file(), (readme, words)
        launcher = words[: next(i for i, word in enumerate(words) if program([word]))]
        given = {word for word in words[len(launcher) :] if word.startswith("--")}
        assert given <= options(name) | {"--help"}, (readme, name, given - options(name))
        for word in words:
            if re.match(r"(recipes/configs|accelerate_configs)/", word):
                assert (ROOT / word).exists(), (readme, word)


def test_every_program_of_a_readme_is_run_by_a_test():
    for readme, words in commands():
        name = program(words)
        if name is not None:
            assert name in RUN_BY, f"{readme}: say in RUN_BY which test runs {name}"
    for name, test in RUN_BY.items():
        if test is not None:
            text = (ROOT / test).read_text(encoding="utf-8")
            assert Path(name).name in text or Path(name).stem in text, f"{test} does not run {name}"


def test_the_table_of_scripts_is_whole():
    text = (ROOT / "scripts/README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+\.py)\)", text)) == sorted(path.name for path in ROOT.glob("scripts/*.py"))
