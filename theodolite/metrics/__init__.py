"""torchmetrics shells round `theodolite.functional`: states that merge exactly over batches and ranks."""

from theodolite.metrics.fvu import FractionOfVarianceUnexplained
