# `make demo`, `make test` and `make lint` set up .venv themselves; nothing but python3 (with pip) and make is assumed.
UV := .uv/bin/uv
PYTHON := .venv/bin/python
DEMO := outputs/demo
FAMILY := outputs/demo_family
LAUNCH := .venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
# How long threads spin while they wait for each other. At its default a small model is five times slower on a busy
# machine; without any (OMP_WAIT_POLICY = PASSIVE) it is twice as slow on every one.
export GOMP_SPINCOUNT = 20000

.PHONY: setup test test-all lint fuzz demo demo-family ablation miniature clean

setup: .venv/.ready

# transformers 5.23 needs Python 3.11: uv takes the machine's if it is new enough, else it fetches one. Compiled now (half
# a minute), packages are imported in half the time also where PYTHONDONTWRITEBYTECODE is set, as in many containers.
.venv/.ready: setup.cfg constraints.txt pyproject.toml
	test -x $(UV) || python3 -m pip install --quiet --target .uv "uv==0.13.8"
	test -x $(PYTHON) || $(UV) venv --quiet --python ">=3.11,<3.15" .venv
	$(UV) pip install --quiet --python $(PYTHON) --constraint constraints.txt --compile-bytecode --editable ".[test]"
	touch $@

# Two processes, each with a hub of its own. The models are so small that a second thread costs more than it brings.
PYTEST = $(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
test test-all: export OMP_NUM_THREADS = 1

# Quick: needs no network, browser, Java or real data. Its last line says what was left out (tests/conftest.py).
test: setup
	$(PYTEST) --quick

# Everything. A test that is skipped because a tool is missing fails; real data may be missing.
test-all: setup lint
	$(PYTEST) --complete -rs

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Ten minutes of damaged and hostile input for every reader, metric, card and page; failures go to outputs/fuzz.
fuzz: setup
	$(UV) pip install --quiet --python $(PYTHON) "atheris==3.0.0" || echo "atheris does not install here: hypothesis alone"
	$(PYTHON) -m tests.fuzz --seconds 600

# Drawn scenes -> published dataset -> QLoRA of the miniature -> scores, audit, model card, comparison. Offline.
demo: export HF_HUB_OFFLINE = 1
demo: setup
	rm -rf $(DEMO)
	$(MAKE) $(DEMO)/dataset/README.md
	$(LAUNCH) recipes/sft_qwen2vl_jp.py \
		--config recipes/configs/sft_qwen2vl_jp/demo.yaml
	$(PYTHON) scripts/compare_runs.py base=$(DEMO)/base adapter=$(DEMO)/adapter --dataset $(DEMO)/dataset \
		--output_dir $(DEMO)/comparison

$(DEMO)/dataset/README.md: | setup
	$(PYTHON) scripts/draw_scenes.py --output_dir $(DEMO)/scenes
	$(PYTHON) scripts/publish_datasets.py --source stair --tokenizer recipes/miniatures/qwen2_vl \
		--annotations $(DEMO)/scenes/stair_train.json $(DEMO)/scenes/stair_val.json --images $(DEMO)/scenes/images \
		--yj_annotations $(DEMO)/scenes/yj.json --val_ids $(DEMO)/scenes/val_ids.txt \
		--test_ids $(DEMO)/scenes/test_ids.txt --output_dir $(DEMO)/dataset \
		--card scenes --pretty_name "Drawn scenes with Japanese captions" --license cc0-1.0

# The three recipes of the family on their miniatures: BLIP + LoRA in Vietnamese, ViT + GPT-2 and ViT + Llama on titles.
demo-family: export HF_HUB_OFFLINE = 1
demo-family: setup
	rm -rf $(FAMILY)
	$(PYTHON) scripts/draw_scenes.py --kind vietnamese --output_dir $(FAMILY)/scenes_vi
	$(PYTHON) scripts/publish_datasets.py uit_viic --annotations $(FAMILY)/scenes_vi/uitviic_captions_train2017.json \
		$(FAMILY)/scenes_vi/uitviic_captions_val2017.json $(FAMILY)/scenes_vi/uitviic_captions_test2017.json \
		--images $(FAMILY)/scenes_vi/images --output_dir $(FAMILY)/dataset_vi --card scenes_vi \
		--pretty_name "Drawn scenes with Vietnamese captions" --license cc0-1.0
	$(PYTHON) scripts/draw_scenes.py --kind titles --output_dir $(FAMILY)/scene_titles
	$(PYTHON) scripts/publish_datasets.py food_titles --annotations $(FAMILY)/scene_titles/titles.csv \
		--images $(FAMILY)/scene_titles/images --output_dir $(FAMILY)/dataset_titles --card scene_titles \
		--pretty_name "Drawn scenes with titles" --license cc0-1.0
	$(LAUNCH) recipes/sft_blip_vi.py --config recipes/configs/sft_blip_vi/demo.yaml
	$(LAUNCH) recipes/sft_vit_gpt2_food.py --config recipes/configs/sft_vit_gpt2_food/demo.yaml
	$(LAUNCH) recipes/sft_vit_llama_food.py --config recipes/configs/sft_vit_llama_food/demo.yaml
	$(PYTHON) scripts/compare_runs.py --overview --output_dir $(FAMILY)/overview \
		"BLIP, zero-shot=$(FAMILY)/blip_vi/base" "BLIP + LoRA=$(FAMILY)/blip_vi/adapter" \
		"ViT + GPT-2, untrained=$(FAMILY)/vit_gpt2_food/base" "ViT + GPT-2=$(FAMILY)/vit_gpt2_food/model" \
		"ViT + Llama, untrained=$(FAMILY)/vit_llama_food/base" "ViT + Llama + LoRA=$(FAMILY)/vit_llama_food/adapter"

# A grid of settings on the miniature: rank, depth, projector, label smoothing, resolution, two seeds each.
ablation: export HF_HUB_OFFLINE = 1
ablation: setup $(DEMO)/dataset/README.md
	$(PYTHON) scripts/run_ablation.py --config recipes/configs/sft_qwen2vl_jp/ablation_demo.yaml

# The committed checkpoints of the miniatures, pretrained again from their seeds.
miniature: setup
	for model in qwen2_vl blip vit gpt2 llama; do \
		$(PYTHON) scripts/pretrain_miniature.py --model $$model --output_dir recipes/miniatures/$$model || exit 1; done

clean:
	rm -rf outputs .venv .uv
