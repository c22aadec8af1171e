"""scripts/run_ablation.py from a grid file to the comparison of its cells."""

import yaml

# A recipe as far as the script sees it: captions that are better the higher the rank, scored; rank 13 fails.
RECIPE = """
import argparse, json, pathlib
from tests.reporting.documents import document
from vlmcap.evaluation.scoring import ScoreOptions, write_metrics
parser = argparse.ArgumentParser()
for name in ("config", "output_dir", "lora_r", "resume_from_checkpoint"):
    parser.add_argument("--" + name)
args = parser.parse_args()
rank = int(args.lora_r or 32)
if rank == 13:
    raise SystemExit("error: rank 13 brings bad luck")
references = {str(i): [f"{i}匹の犬が公園を走っている", f"公園を走る{i}匹の犬"] for i in range(1, 9)}
captions = {i: texts[0] if int(i) * 8 <= rank else "猫がいる" for i, texts in references.items()}
adapter = pathlib.Path(args.output_dir) / "adapter"
adapter.mkdir(parents=True, exist_ok=True)
lines = (json.dumps({"image_id": int(i), "caption": text}) + "\\n" for i, text in captions.items())
(adapter / "predictions.jsonl").write_text("".join(lines))
record = document((0.0,) * 6, 20.0, "adapter")
scorers = "scores signatures intervals bootstrap register_normalised counts notices per_image".split()
record = {key: value for key, value in record.items() if key not in scorers}
(adapter / "predictions.run.json").write_text(json.dumps(record))
training = {"trainable_parameters": 1000 * rank, "seconds": 2.0, "peak_memory_bytes": rank * 2**30, "log": []}
write_metrics(
    adapter / "predictions.jsonl", references, adapter / "metrics.json", more={"training": training},
    options=ScoreOptions(meteor=False),
)
"""


def test_grid_to_comparison(run_script, repo_root, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "base.yaml").write_text("lora_r: 32\n")
    grid = {
        "recipe": str(tmp_path / "recipe.py"),
        "config": str(tmp_path / "base.yaml"),
        "output_dir": str(tmp_path / "elsewhere"),
        "launch": ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"],
        "vary": {"lora_r": [13, 64]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = ["run_ablation.py", "--config", tmp_path / "grid.yaml", "--output_dir", tmp_path / "out"]
    env = {"PYTHONPATH": str(repo_root)}

    planned = run_script(*command, "--dry_run", env=env).stdout.splitlines()
    assert [line.split() for line in planned] == [["new", "reference"], ["new", "lora_r=13"], ["new", "lora_r=64"]]

    done = run_script(*command, env=env, expect=1)
    assert "1 of 3 cells failed" in done.stderr and "rank 13 brings bad luck" in done.stderr
    assert not (tmp_path / "elsewhere").exists()
    table = (tmp_path / "out/ablation.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert "32,000" in rows["reference"] and "32.00" in rows["reference"]
    assert rows["lora_r=13"].count(" - ") >= 3
    comparison = tmp_path / "out/comparison"
    csv = (comparison / "metrics.csv").read_text()
    assert "reference," in csv and "lora_r=64," in csv and "lora_r=13" not in csv
    assert (comparison / "comparison.html").exists()
    assert run_script(*command, "--dry_run", env=env).stdout.split()[::2] == ["finished", "failed", "finished"]
