"""What the Hub reads of a card: its YAML block, and scores for .eval_results/."""

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from vlmcap.reporting.card_facts import (
    LANGUAGES,
    SMOLLM2,
    built_with_llama,
    card_title,
    is_decoder,
    is_hub_id,
    is_miniature,
    language_names,
    languages_of,
    miniature_encoder,
    model_parts,
    on_hub,
    other_keys,
    public_id,
    recipe_of,
    score_label,
)


def card_metadata(metrics: dict, repo_id: str | None) -> ModelCardData:
    """The YAML block of a card; `repo_id`, "user/name", gives the model its name there."""
    recipe, dataset, training_id = recipe_of(metrics), metrics["dataset"], metrics["training"]["dataset"]["id"]
    bases = [part["id"] for part in model_parts(metrics["model"]).values()]
    public, whole = on_hub(metrics), recipe.trained == "model"
    spoken = [LANGUAGES[code].lower() for code in languages_of(metrics)] if recipe.trained_with_prompt else []
    tags = ["image-captioning", *spoken, *recipe.tags, "vlmcap"]
    if is_decoder(metrics, SMOLLM2):
        tags[tags.index("llama")] = SMOLLM2
    results = [
        EvalResult(
            task_type=recipe.pipeline_tag,
            task_name=recipe.task.format(languages=language_names(metrics)),
            dataset_type=public_id(dataset["id"]),
            dataset_name=public_id(dataset["id"]),
            dataset_split=dataset["split"],
            dataset_revision=dataset["revision"],
            metric_type=name.split("_")[0],
            metric_name=f"{score_label(name)}, {key}" if key else score_label(name),
            metric_value=score,
            metric_args={"signature": scored["signatures"][name]},
        )
        for key, scored in {metrics.get("key"): metrics, **other_keys(metrics)}.items()
        for name, score in scored["scores"].items()
    ]
    return ModelCardData(
        # The Hub's validation refuses a local path in base_model or datasets, so they are given for Hub ids only.
        base_model=(bases[0] if len(bases) == 1 else bases) if public else None,
        base_model_relation=("finetune" if whole else "adapter") if public else None,
        datasets=[training_id] if is_hub_id(training_id) else None,
        language=languages_of(metrics),
        library_name="transformers" if whole else "peft",
        license=_license(metrics),
        pipeline_tag=recipe.pipeline_tag,
        tags=tags + (["miniature"] if is_miniature(metrics) or miniature_encoder(metrics) else []),
        model_name=repo_id.split("/")[1] if repo_id else card_title(metrics),
        eval_results=results,
    )


def merged_metadata(metrics: dict, repo_id: str | None, merged: dict) -> ModelCardData:
    """Those of a fine-tuned base, under the licence of the base's weights; without scores, which are the adapter's."""
    data = card_metadata(metrics, repo_id)
    data.base_model_relation = "finetune" if data.base_model else None
    data.library_name, data.eval_results, data.model_name = "transformers", None, None
    data.tags = [tag for tag in data.tags if tag != "lora"]
    data.license = None  # the recipe's is that of the adapter
    for key, value in merged["licence"].items():
        data[key] = value
    return data


def eval_result_entries(metrics: dict, repo_id: str | None = None) -> list[EvalResultEntry]:
    """One entry per score for `.eval_results/*.yaml` (https://huggingface.co/docs/hub/eval-results).

    The format requires a dataset id of the Hub: scores on a local dataset give an empty list. The task id is
    "<split>_<metric>"; the Hub shows an entry once the dataset's own eval.yaml registers that task.
    """
    dataset = metrics["dataset"]
    if not is_hub_id(dataset["id"]):
        return []
    source = {}
    if repo_id:
        source = {
            "source_url": f"https://huggingface.co/{repo_id}/blob/main/metrics.json",
            "source_name": "metrics.json",
        }
    beams = metrics["decoding"]["num_beams"]
    return [
        EvalResultEntry(
            dataset_id=dataset["id"],
            task_id=f"{dataset['split']}_{name}",
            dataset_revision=dataset["revision"],
            value=score,
            date=metrics["created"],
            notes=f"{metrics['signatures'][name]}, num_beams {beams}",
            **source,
        )
        for name, score in metrics["scores"].items()
    ]


def _license(metrics: dict) -> str:
    license_ = recipe_of(metrics).license
    if is_miniature(metrics) or is_decoder(metrics, SMOLLM2):
        return "apache-2.0"
    return "other" if license_ == "llama3.2" and not built_with_llama(metrics) else license_
