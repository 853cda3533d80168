"""EleutherAI's lm-eval against the running app: its scores equal those computed with plain Transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from tests.conftest import LiveApp, greedy

TIMEOUT = 240  # seconds; it imports for half a minute
DOCS = [
    {"question": "The quick brown fox jumps over", "choices": ["the lazy dog", "a bee", "servers"], "answer": 0},
    {"question": "Ein Schwarm von", "choices": ["Servern", "Fox"], "answer": 0},
    {"question": "Une abeille,", "choices": ["deux abeilles", "the dog", "nobody"], "answer": 1},
    {"question": "分散", "choices": ["された", "モデル"], "answer": 1},
    {"question": "Who said", "choices": ["that?", "the swarm"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
# By name: what is particular to each.
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "write": """
output_type: generate_until
doc_to_target: "{{expected}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def likelihood(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> float:
    """The sum of the log-probabilities of a continuation's tokens."""
    whole, begin = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    logprobs = reference(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, whole[i]]) for i in range(begin, len(whole)))


@torch.inference_mode()
def test_scores_equal_transformers(
    live_app: LiveApp,
    tiny_bloom: Path,
    reference: BloomForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    texts = [
        tokenizer.decode(greedy(reference, tokenizer.encode(str(doc["question"])), 12)).split("\n\n")[0] for doc in DOCS
    ]
    # All answers but the last are right.
    expected = [*texts[:-1], "something else"]
    data = tmp_path / "docs.jsonl"
    lines = [json.dumps(doc | {"expected": text}) for doc, text in zip(DOCS, expected, strict=True)]
    data.write_text("\n".join(lines))
    for name, particulars in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + particulars)
    arguments = [
        f"model={live_app.model_name}",
        f"base_url={live_app.url}/v1/completions",
        f"tokenizer={tiny_bloom}",
        "tokenizer_backend=huggingface",
        "num_concurrent=2",
        "max_retries=1",
    ]
    command: list[str | Path] = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", ",".join(arguments)]
    command += ["--tasks", ",".join(TASKS), "--include_path", tmp_path, "--output_path", tmp_path / "out"]
    command += ["--log_samples", "--batch_size", "4", "--seed", "1"]
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=tmp_path,
        env={**os.environ, "OPENAI_API_KEY": "none", **environment},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    (summary,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(summary.read_text())["results"]
    likelihoods = [
        [likelihood(reference, tokenizer, str(doc["question"]), f" {choice}") for choice in doc["choices"]]  # type: ignore[attr-defined]
        for doc in DOCS
    ]
    best = [values.index(max(values)) for values in likelihoods]
    right = sum(choice == doc["answer"] for choice, doc in zip(best, DOCS, strict=True))
    assert scores["choose"]["acc,none"] == pytest.approx(right / len(DOCS))
    assert scores["write"]["exact_match,none"] == pytest.approx((len(DOCS) - 1) / len(DOCS))

    (samples,) = (tmp_path / "out").rglob("samples_choose_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(likelihoods[sample["doc_id"]], abs=1e-2)
