"""Small real models to merge, made on the spot: no download, under a minute on two cores.

``python -m experiments.zoo.digits`` makes the **digits** zoo in ``zoo/digits``::

    zoo/digits/
    ├── base/        a ViT of 203,082 parameters (six blocks of width 64, 8x8 grey images, ten classes)
    ├── upright/     the same model, fine-tuned on one domain only: four experts that share a base
    ├── rotated/         turned by 90 degrees
    ├── mirrored/        left and right exchanged
    ├── inverted/        black and white exchanged
    ├── data/        items to merge for: splits search, validation, test; columns pixels, label, domain, id
    └── manifest.json    settings and measured accuracies

Each model is an ordinary Hugging Face folder (config, safetensors, image processor). Images are scikit-learn's
copy of Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits"; the images behind the three splits and
those used for training are disjoint, and every split holds every one of its images once in each domain.

It is tuned so that merging matters: the base is mediocre everywhere, each expert is good at home and poor elsewhere,
and no single coefficient shared by all experts does much for all domains. ``--measure`` prints the table. The same
settings on the same machine and library versions give the same weights, bit for bit.
"""
