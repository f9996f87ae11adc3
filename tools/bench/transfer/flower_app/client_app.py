"""A device that trains nothing, as a ClientApp: run by Flower's interpreter."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Send the tensors back, each a little changed.

    Flower sends no object that the other side holds already, and finds it by its hash: tensors that come back as they
    went would not travel at all.
    """
    own = context.node_id / 2**64
    arrays = ArrayRecord([array.numpy() + own for array in message.content["arrays"].values()])
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
