"""Runs in a venv with onnxruntime and onnxruntime-genai: runs exported decoders on the CPU.

usage: read_with_onnxruntime.py JOBS.json, a list of {"model": folder, "ids": token ids, "out": safetensors file,
"prompt": how many of the ids come first in "stepped" (default 10), "tokens": how many to generate with
onnxruntime-genai (default none), "text": to be encoded by its tokenizer (default none)}

Writes logits [len(ids), vocabulary], all at once; stepped, the same with the keys and values of the prompt as past and
the other ids one by one; tokens, greedily; encoded, the ids of the text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import save_file


def main(jobs: list[dict]) -> None:
    for job in jobs:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(Path(job["model"]) / "model.onnx", options,
                                               providers=["CPUExecutionProvider"])
        ids, prompt = job["ids"], job.get("prompt", 10)
        logits, _ = forward(session, ids, {}, 0)
        first, past = forward(session, ids[:prompt], {}, 0)
        stepped = [first]
        for place in range(prompt, len(ids)):
            one, past = forward(session, ids[place:place + 1], past, place)
            stepped.append(one)
        del session
        answers = {"logits": logits, "stepped": np.concatenate(stepped)}
        if job.get("tokens"):
            answers |= generate(job)
        save_file({name: np.ascontiguousarray(one) for name, one in answers.items()}, job["out"])


def forward(session: onnxruntime.InferenceSession, ids: list[int], past: dict, before: int) -> tuple[np.ndarray, dict]:
    """Logits [len(ids), vocabulary] and the keys and values to be handed in next time."""
    given = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, before + len(ids)), np.int64)}
    for one in session.get_inputs():
        if one.name.startswith("past_key_values."):
            empty = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float16 if "16" in one.type else np.float32)
            given[one.name] = past.get(one.name, empty)
    names = [one.name for one in session.get_outputs()]
    answers = dict(zip(names, session.run(names, given), strict=True))
    kept = {name.replace("present.", "past_key_values."): one for name, one in answers.items() if name != "logits"}
    return answers["logits"][0].astype(np.float32), kept


def generate(job: dict) -> dict[str, np.ndarray]:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(job["model"])
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(job["ids"]) + job["tokens"], do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array(job["ids"], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    answers = {"tokens": np.array(generator.get_sequence(0)[len(job["ids"]):], np.int64)}
    if job.get("text"):
        answers["encoded"] = np.array(onnxruntime_genai.Tokenizer(model).encode(job["text"]), np.int64)
    return answers


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
