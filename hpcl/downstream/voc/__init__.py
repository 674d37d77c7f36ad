"""Tasks on a folder in VOC form: `classify` by linear SVMs, `detect` by Faster R-CNN.

`data` reads the folder (annotations by `xml`), `average_precision` and `box_precision` score;
`detector` is the network.
"""
