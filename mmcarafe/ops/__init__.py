from mmcarafe.ops import cpu  # noqa: F401  registers itself
from mmcarafe.ops.carafe import carafe, carafe_from_logits

__all__ = ['carafe', 'carafe_from_logits']
