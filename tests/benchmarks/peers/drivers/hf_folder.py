"""Write a GGUF file's weights, dequantized to float32, and its tokenizer as a folder of transformers' own format."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main(gguf: Path, folder: Path) -> None:
    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # a model read from GGUF counts as quantized, and is not saved
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
