"""A study from models and data alone: what is seen in them, and what is proposed for them."""
