"""Tests. The import is for jaxtyping, which is given a name below it and imports this package alone."""

from tests import typechecker as typechecker
