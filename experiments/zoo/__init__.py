"""Small real models to merge, made on the spot, in one to four minutes each on two cores.

Nothing is downloaded but the base of the minilm zoo.

``python -m experiments.zoo.digits`` makes the **digits** zoo in ``zoo/digits``::

    zoo/digits/
    ├── base/          a ViT of 203,082 parameters (six blocks of width 64, 8x8 grey, ten classes)
    ├── upright/       the same model, fine-tuned on one domain only: four experts of one base
    ├── rotated/       turned by 90 degrees
    ├── mirrored/      left and right exchanged
    ├── inverted/      black and white exchanged
    ├── data/          items: splits search, validation, test; columns pixels, label, domain, id
    └── manifest.json  settings and measured accuracies

``python -m experiments.zoo.skills`` makes the **skills** zoo in ``zoo/skills``, two minutes::

    zoo/skills/
    ├── base/      a Llama of 0.7M parameters with a tokenizer of its own, trained a little on text
    │              and five skills
    ├── addition/ sorting/ brackets/ reversal/ knowledge/
    │              the same model, fine-tuned on one skill
    ├── data/      of each skill, and of text: splits search, validation, test
    └── tasks/     task files for lm_eval: choices, log-likelihood, rolling, generation

``python -m experiments.zoo.segments`` makes the **segments** zoo in ``zoo/segments``, three
minutes: a small SAM, three experts (``tomography``, ``sonography``, ``radiography``), synthetic
images of four modalities with boxes and masks.

``python -m experiments.zoo.minilm`` makes the **minilm** zoo in ``zoo/minilm``, four minutes and a
download of 84 MB: a published sentence encoder of 22.7M parameters, three text classifiers of it
(``packages``, ``errors``, ``modules``) with heads of their own, and texts from the source code of
installed packages.

``python -m experiments.zoo.gridworld`` makes the **gridworld** zoo in ``zoo/gridworld``: a small
vision tower, and three policies (``reach``, ``collect``, ``pass``) that act on pixels by LoRA
changes of it and action heads of their own. Its items are episodes, which are played.

``python -m experiments.zoo.questions`` makes the **questions** zoo in ``zoo/questions``, one
minute: a LLaVA of 0.2M parameters and four experts (``digits``, ``shapes``, ``stripes``,
``counts``) that answer questions about the pictures of the CLIP zoo.

``python -m experiments.zoo.clip`` makes the **clip** zoo in ``zoo/clip``: a tiny CLIP and four
experts whose vision towers alone are fine-tuned. ``experiments.zoo.moe`` makes a small Mixtral,
``experiments.zoo.seeds`` models of one task that share no start, and ``experiments.zoo.shapes``
language models of three architectures.

Each model is an ordinary Hugging Face folder (config, safetensors, image processor or tokenizer).
Digits are those of scikit-learn's copy of Alpaydin and Kaynak 1998, "Optical Recognition of
Handwritten Digits"; items behind the three splits and those used for training are disjoint in every
zoo, and every split of digits holds every one of its images once in each domain.

Digits are tuned so that merging matters: the base is mediocre everywhere, each expert is good at
home and poor elsewhere, and no single coefficient shared by all experts does much for all domains.
``--measure`` prints the table. The same settings on the same machine and library versions give the
same weights, bit for bit.
"""
