"""What the learnt features are good for: tasks that use labels, on frozen or fine-tuned networks.

`scores` is what a task gives, `bench` what all tasks share, `tasks` finds them by name. A task is one file with
``run(bench, encoders, seed)`` and ``refusal(bench)``: knn, linear, fewshot, clusters on frozen features; finetune,
distill, sgan with few labels (`labels` draws them, `supervised` trains); voc.classify and voc.detect on a folder in VOC
form (`voc`). :func:`hpcl.evaluate.evaluate` runs them on a checkpoint.
"""
