"""Whether a model keeps the examples of a packed row apart."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["keeps_apart"]


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Try it: what comes before an example in its row must not change what the model makes of the example.

    The attention mask of transformers is built from positions that start again at 0 where no mask is given and no cache
    is kept. An architecture that counts positions in another way, or carries a state along, would mix the examples
    without a word.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(vocabulary, (1, 6), generator=generator).to(device)
    before = torch.randint(vocabulary, (2, 1, 5), generator=generator).to(device)
    positions = torch.cat([torch.arange(5), torch.arange(6)]).unsqueeze(0).to(device)
    was_training = model.training
    model.eval()
    try:
        found = [
            model(input_ids=torch.cat([other, example], 1), position_ids=positions, use_cache=False).logits[0, 5:]
            for other in before
        ]
    except (TypeError, ValueError):  # it takes no positions
        return False
    finally:
        model.train(was_training)
    # The same numbers in the same places of a masked row: what differs comes from the other example.
    return bool(torch.equal(found[0], found[1]))
