def entropy(predictions, reduction="none"):
    rows = (-predictions * (predictions + 1e-5).log()).sum(dim=1)
    return rows.mean() if reduction == "mean" else rows
