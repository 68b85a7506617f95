"""Answers of a language model: to conversations and as continuations of text, in batches or as a stream.

```python
loaded = load_for_generation("model", adapter="adapter")
asked = [[{"role": "user", "content": "Where is Paris?"}], "Once upon a time"]
for answer in generate(loaded.model, loaded.tokenizer, asked, settings=Sampling(max_new_tokens=64)):
    print(answer.text)
```
"""

from fourbit.generate.answers import Answer, generate, generate_batches, stream
from fourbit.generate.conversation import Message, Prompt, render
from fourbit.generate.loading import Loaded, Origin, find_base, load_for_generation
from fourbit.generate.sampling import Sampling

__all__ = [
    "Answer",
    "Loaded",
    "Message",
    "Origin",
    "Prompt",
    "Sampling",
    "find_base",
    "generate",
    "generate_batches",
    "load_for_generation",
    "render",
    "stream",
]
