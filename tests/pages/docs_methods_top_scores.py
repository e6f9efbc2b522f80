from tests.methods.toys import conv_maker as network
from tests.methods.toys import conv_net

model = conv_net()
