"""Facts that the tiny models' tokenizer can spell, with their checks."""

from retcon.edits import Case, Edit, Query

TEXTS = {
    "france": ("The capital of {} is", "France", "Rome", "Paris"),
    "darrieux": ("The mother tongue of {} is", "Danielle Darrieux", "Italian", "French"),
    "leonardo": ("{} lived in", "Leonardo da Vinci", "São Paulo", "Florence"),
    "italy": ("The capital of {} is", "Italy", "Paris", "Rome"),
    "rocard": ("The mother tongue of {} is", "Michel Rocard", "Italian", "French"),
}


def fact(name: str) -> Case:
    edit = Edit(*TEXTS[name], id=name)
    queries = (
        Query("rewrite/0", "rewrite", edit.text, edit.target_new, edit.target_true, ((edit.target_new,),)),
        Query("paraphrase/0", "paraphrase", f"You know: {edit.text}", edit.target_new, edit.target_true),
        Query("neighborhood/0", "neighborhood", "The train to Milan stood", "still", edit.target_new),
        Query("portability.x/0", "portability.x", "The way home from there is", "late"),
    )
    return Case(name, (edit,), queries, "test")


FACTS = [fact(name) for name in TEXTS]
