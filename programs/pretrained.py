"""Reads a causal language model of transformers: from a directory or, by its name, from the hub or
transformers' cache of it. Weights are those of the files, all of them, or it is refused."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from neighborlm.common.errors import InputError
from neighborlm.datamodules.hf_tokenizer import HuggingFaceVocabulary
from neighborlm.models.huggingface import HuggingFaceLM, refuse_encoders
from neighborlm.programs.settings import PretrainedSettings

PICKLES = ("*.bin", "*.pt", "*.pth")


def load_pretrained(settings: PretrainedSettings) -> HuggingFaceLM:
    """The model, on the CPU unless `device_map` says otherwise.

    Raises:
        InputError: there is none, it is no causal language model, or its files lack weights.
    """
    name = settings.pretrained
    if not name:
        raise InputError(
            "--model.pretrained is missing; expected a directory with a model of transformers, or "
            "a name on the Hugging Face hub"
        )
    check_directory(settings)
    where = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, **where)
        check_kind(config, settings)
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=settings.dtype,
            device_map=settings.device_map,
            use_safetensors=None if settings.allow_pickle else True,
            output_loading_info=True,
            **where,
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--model.pretrained {name}: transformers cannot read it ({first_sentence(error)}); "
            "expected a directory with a causal language model, or a name on the Hugging Face hub"
        ) from error
    lacking = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if lacking:
        raise InputError(
            f"--model.pretrained {name}: its files lack {len(lacking)} of the weights of a "
            f"{type(model).__name__}, such as {sorted(lacking)[0]}, or have them in another shape; "
            "expected all of them"
        )
    return HuggingFaceLM(model, name)


def check_directory(settings: PretrainedSettings) -> None:
    """Refuses what cannot be a name on the hub and is no directory with a model."""
    name = settings.pretrained
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.exists() or name[0] in "./~" or name.count("/") > 1:
            found = "a file" if path.exists() else "no such directory"
            raise InputError(
                f"--model.pretrained {name}: {found}; expected a directory with a model of "
                "transformers, or a name on the Hugging Face hub"
            )
        return
    if not (path / "config.json").is_file():
        raise InputError(
            f"--model.pretrained {name}: has no config.json; expected a directory that a model of "
            "transformers was saved to"
        )
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(found.name for pattern in PICKLES for found in path.glob(pattern))
    if not pickles:
        raise InputError(
            f"--model.pretrained {name}: has no weights; expected *.safetensors beside config.json"
        )
    if settings.allow_pickle:
        return
    raise InputError(
        f"--model.pretrained {name}: has {pickles[0]}, but no *.safetensors; expected these, or "
        "--model.allow_pickle true for files that you trust"
    )


def check_kind(config: PreTrainedConfig, settings: PretrainedSettings) -> None:
    """Refuses a config of a model that is no causal language model."""
    name = f"--model.pretrained {settings.pretrained}"
    refuse_encoders(config, name)
    remote = settings.trust_remote_code and hasattr(config, "auto_map")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise InputError(
            f"{name}: is a {config.model_type}, of which transformers has no causal language "
            "model; expected one (AutoModelForCausalLM)"
        )


def check_tokenizer(settings: PretrainedSettings, tokenizer: str) -> None:
    """Refuses a tokenizer that gives tokens other ids than the model's own, where it has one."""
    try:
        own = HuggingFaceVocabulary.load(settings.pretrained, settings.revision)
    except InputError:
        return
    given = HuggingFaceVocabulary.load(tokenizer)
    if given.tokens != own.tokens:
        raise InputError(
            f"--data.tokenizer {tokenizer}: gives other ids than the tokenizer of "
            f"--model.pretrained {settings.pretrained}; expected that one, or no such flag"
        )


def first_sentence(error: Exception) -> str:
    """Of what a library says, on one line."""
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
