"""Questions and their answers, and the small real models that they are asked of. Not shipped with
the product.
"""
