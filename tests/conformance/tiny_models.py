"""Tiny random checkpoints of the architectures that PEFT's suite loads from the Hub."""

import os
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoConfig

VOCABULARY = 100
_LLAMA_LIKE = dict(hidden_size=16, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
_BERT_LIKE = dict(hidden_size=32, intermediate_size=40, num_attention_heads=4, num_hidden_layers=2)
_GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

# name -> (model class, model type, sizes). PEFT's suite skips tests by
# names that occur in a path ("llama", "gemma3", "gpt2"), for reasons of other methods: the names here avoid them.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", "opt", dict(hidden_size=16, ffn_dim=40, num_attention_heads=4, num_hidden_layers=3)),
    "OPT-64": (
        "OPTForCausalLM",
        "opt",
        dict(hidden_size=64, ffn_dim=128, num_attention_heads=4, num_hidden_layers=3, word_embed_proj_dim=64),
    ),
    "GPT-2": ("GPT2LMHeadModel", "gpt2", _GPT),
    "GPTJ": ("GPTJForCausalLM", "gptj", dict(**_GPT, rotary_dim=4)),
    "Lama": ("LlamaForCausalLM", "llama", dict(**_LLAMA_LIKE, num_hidden_layers=2)),
    "Qwen2": ("Qwen2ForCausalLM", "qwen2", dict(**_LLAMA_LIKE, num_hidden_layers=3)),
    "Gemma-3": ("Gemma3ForCausalLM", "gemma3_text", dict(**_LLAMA_LIKE, num_hidden_layers=2, head_dim=8)),
    "T5": (
        "T5ForConditionalGeneration",
        "t5",
        dict(d_model=32, d_ff=40, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "Bart": (
        "BartForConditionalGeneration",
        "bart",
        dict(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
            decoder_start_token_id=2,
        ),
    ),
    "Bert": ("BertModel", "bert", _BERT_LIKE),
    "Roberta": ("RobertaModel", "roberta", _BERT_LIKE),
    "Deberta": ("DebertaModel", "deberta", _BERT_LIKE),
    "DebertaV2": ("DebertaV2Model", "deberta-v2", _BERT_LIKE),
    "BertSeqCls": ("BertForSequenceClassification", "bert", _BERT_LIKE),
    "RobertaSeqCls": ("RobertaForSequenceClassification", "roberta", _BERT_LIKE),
    "LamaSeqCls": ("LlamaForSequenceClassification", "llama", dict(**_LLAMA_LIKE, num_hidden_layers=2)),
}


def build(name: str, cache: Path) -> str:
    """Writes the checkpoint `name` under `cache`, unless it is there, and returns its path."""
    folder = cache / f"tiny-{name}"
    if folder.exists():
        return str(folder)
    class_name, model_type, sizes = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **_TOKENS, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, class_name)(config)
        for parameter in model.parameters():  # the usual 0.02 leaves logits too small to tell adapters apart
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=cache)
    model.save_pretrained(scratch)
    try:
        os.rename(scratch, folder)
    except OSError:  # a parallel run was faster
        shutil.rmtree(scratch)
    return str(folder)


def add_tokenizer(folder: str) -> None:
    """Puts a tokenizer of single characters beside a checkpoint."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(special + list(string.printable[: VOCABULARY - len(special)]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=32
    ).save_pretrained(folder)
