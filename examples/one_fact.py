"""Edit one fact of a model that comes with the package, look, and undo it."""

import retcon

lm = retcon.load("demo:gptj")
edit = retcon.Edit("{} lies within the borders of", subject="Geneva", target_new="Norway", target_true="Switzerland")

delta = retcon.method("jeep", for_model=lm).propose(lm, [edit])  # the model is untouched
print("before:", lm.complete(edit.text))
with lm.edited(delta):
    print("edited:", lm.complete(edit.text))
print("after: ", lm.complete(edit.text))
