"""torchmetrics shells round `theodolite.functional`: states that merge exactly over batches and ranks."""
