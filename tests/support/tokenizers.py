"""A byte-level tokenizer made on the spot, and chat templates for it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
GENERATING = PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }};{% endgeneration %}{% else %}{{ m['content'] }};{% endif %}{% endfor %}"
)


def byte_tokenizer(chat_template: str | None = None, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, 256 of them and the end token, so that a test can count characters."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<end>"} if eos else {}))
    fast.chat_template = chat_template
    return fast
