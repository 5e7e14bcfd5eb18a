from mmcarafe.ops.carafe import (
    carafe,
    carafe_from_logits,
    window_similarity,
)

__all__ = ['carafe', 'carafe_from_logits', 'window_similarity']
