"""`python -m ctxtrain` is `ctxtrain`; `torchrun … -m ctxtrain train …` runs it in several processes."""

from ctxtrain.cli.process import main

main()
