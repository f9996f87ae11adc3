"""PEFT on torch, as a worker: run by the peers' interpreter, so nothing of Fleetune is imported here."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModel, BitsAndBytesConfig


def main(spec: dict) -> None:  # type: ignore[type-arg]
    """Train LoRA adapters and a linear head; answer requests."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    data = {name: torch.from_numpy(array) for name, array in load_file(spec["samples"]).items()}
    initial = load_file(spec["initial"])
    options = {}
    if spec["quantised"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = AutoModel.from_pretrained(spec["backbone"], dtype=torch.float32, **options)
    blocks = model.config.num_hidden_layers
    lora = LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["rank"],
        lora_dropout=0.0,
        target_modules=["query", "value"],
        layers_to_transform=list(range(blocks - spec["depth"], blocks)),
        layers_pattern="layer",
    )
    model = get_peft_model(model, lora)
    head = torch.nn.Linear(model.config.hidden_size, initial["head.bias"].shape[0])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(initial["head.weight"].T))
        head.bias.copy_(torch.from_numpy(initial["head.bias"]))
        for name, module in model.named_modules():
            target = name.rpartition(".")[2]
            if hasattr(module, "lora_A") and target in ("query", "value"):
                block = name.split(".layer.")[1].split(".")[0]
                module.lora_A["default"].weight.copy_(torch.from_numpy(initial[f"blocks.{block}.{target}.A"].T))
                module.lora_B["default"].weight.copy_(torch.from_numpy(initial[f"blocks.{block}.{target}.B"].T))
    parameters = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=spec["rate"], weight_decay=spec["decay"])
    model.train(mode=False)  # dropout off, as in the other engine

    def features(rows: slice) -> torch.Tensor:
        if "ids" in data:
            mask = data["mask"][rows]
            hidden = model(input_ids=data["ids"][rows], attention_mask=mask).last_hidden_state
            weights = mask[:, :, None].to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1)
        return model(pixel_values=data["pixels"][rows]).last_hidden_state[:, 0]

    def epoch() -> dict:  # type: ignore[type-arg]
        wall, cpu, losses = time.perf_counter(), time.process_time(), []
        for first in range(0, len(data["labels"]), spec["batch"]):
            rows = slice(first, first + spec["batch"])
            loss = torch.nn.functional.cross_entropy(head(features(rows)), data["labels"][rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "loss": float(np.mean(losses)),
        }

    def peak() -> dict:  # type: ignore[type-arg]
        status = Path("/proc/self/status").read_text(encoding="ascii")
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return {"peak_mib": int(lines["VmHWM"].split()[0]) / 1024}

    def mixture(rows: slice) -> torch.Tensor:
        """Two passes, one with each adapter."""
        found = []
        for name in ("default", "local"):
            model.set_adapter(name)
            found.append(head(features(rows)))
        return torch.softmax(torch.zeros(1, 2), 1) @ torch.cat(found)

    def answer(classify: Callable[[slice], torch.Tensor]) -> dict:  # type: ignore[type-arg]
        """Answer every sample by itself, after a first one that is timed apart."""
        with torch.inference_mode():
            start = time.perf_counter()
            classify(slice(0, 1))
            first, times = time.perf_counter() - start, []
            for index in range(len(data["labels"])):
                start = time.perf_counter()
                classify(slice(index, index + 1))
                times.append(time.perf_counter() - start)
        return {"first_s": first, "median_ms": 1000 * float(np.median(times))}

    def answer_mixture() -> dict:  # type: ignore[type-arg]
        model.add_adapter("local", lora)
        return answer(mixture)

    def answer_one() -> dict:  # type: ignore[type-arg]
        model.set_adapter("default")
        model.merge_adapter()  # the quickest way to serve one adapter
        return answer(lambda rows: head(features(rows)))

    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    answers = {"epoch": epoch, "peak": peak, "mixture": answer_mixture, "one": answer_one}
    for line in sys.stdin:
        print(json.dumps(answers[json.loads(line)["do"]]()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
