"""What a circuit is worth: scores, controls, audits, and models whose circuits are known."""
