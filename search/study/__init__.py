"""The course of a study, from its anchors to the choice of the winner."""
