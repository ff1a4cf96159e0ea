"""From a study file to a checked plan: template, space, anchors, strategy and evaluators."""
