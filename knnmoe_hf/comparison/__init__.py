"""Methods side by side on the same items of the same tasks: scored as the harness scores, with intervals and costs."""
