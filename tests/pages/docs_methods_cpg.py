from tests.methods.toys import conv_maker as network
from tests.methods.toys import conv_net, image_task

photo, sketch = image_task("photo"), image_task("sketch")
trained = conv_net()
