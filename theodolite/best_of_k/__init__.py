"""Best-of-K of talkative autoencoders in resumable stages: candidates, scores, curves."""
