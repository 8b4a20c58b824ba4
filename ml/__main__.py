"""`python -m ml` is `ctxtrain`; `torchrun … -m ml train …` runs it in several processes."""

from ml.cli import main

main()
