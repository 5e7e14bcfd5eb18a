from mmcarafe.ops.carafe import carafe, carafe_from_logits

__all__ = ['carafe', 'carafe_from_logits']
