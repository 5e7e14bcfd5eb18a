from mmcarafe.evaluation.boundary_iou import BoundaryIoUMetric

__all__ = ['BoundaryIoUMetric']
