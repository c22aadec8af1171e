"""The metric's page: captions in, scores out."""

import evaluate
import gradio

TOKENIZERS = ["unidic-lite", "ipadic", "characters", "vietnamese", "english", "none"]
METRIC = evaluate.load("./japanese_caption_metrics.py")
EXAMPLE = """赤い車が道路を走っている
赤い車が走っている
道を走る赤い車

窓辺で猫が寝ている
猫が窓辺で眠っている"""


def compute(text: str, tokenizer: str) -> dict:
    """Scores of blocks of lines, one block an image: its caption first, then its references."""
    blocks = [[line for line in block.splitlines() if line.strip()] for block in text.strip().split("\n\n")]
    try:
        return METRIC.compute(
            predictions=[block[0] for block in blocks],
            references=[block[1:] for block in blocks],
            tokenizer=tokenizer,
        )
    except (IndexError, ValueError) as error:
        raise gradio.Error(str(error)) from error


if __name__ == "__main__":
    gradio.Interface(
        fn=compute,
        inputs=[
            gradio.Textbox(EXAMPLE, lines=12, label="One block an image: its caption, then its references"),
            gradio.Dropdown(TOKENIZERS, label="Tokenizer"),
        ],
        outputs=gradio.JSON(label="Scores"),
        title="Japanese caption metrics",
        description=METRIC.description,
    ).launch()
