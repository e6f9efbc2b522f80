from tests.methods.toys import trained_mlp, vector_batches, vector_task

model, batches, loss = trained_mlp(), vector_batches, vector_task().loss
