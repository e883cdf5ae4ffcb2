"""Programming problems whose tests can be overwritten, and the two graders."""
