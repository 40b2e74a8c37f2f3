"""What a memory did to each token: neighbours, confidence, experts before and after, and what that changed."""
