"""Data sets of the paper's tables.

- ``photographs``: CUB-200-2011 and MIT-67 as they lie on disk; ``photograph_loaders``: batches of
  them, cropped and normalized; ``archives``: fetching and unpacking.
- ``class_folders``: a folder of the user's with a folder of pictures for each class;
  ``pictures``: files of every kind as RGB, and small copies of them.
- ``small_images``: CIFAR, Fashion-MNIST, MNIST, digits and clip art in memory;
  ``small_image_loaders``: batches of them, made on the device; ``idx_files``: the format of both
  MNISTs; ``clip_art``: a Debian package's folders as classes.
- ``package_texts``: short texts with a class, descriptions of Debian's packages.
- ``splits``: N images per class, and what validates; ``loaders``: what both kinds of
  images end in.
"""
