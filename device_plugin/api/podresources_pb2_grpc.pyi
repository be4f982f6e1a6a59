# Types of the generated classes; protoc's Python plugin writes none. Written by hand: keep beside podresources.proto.
import grpc

from device_plugin.api import podresources_pb2 as pb

class PodResourcesListerStub:
    List: grpc.UnaryUnaryMultiCallable[pb.ListPodResourcesRequest, pb.ListPodResourcesResponse]
    Get: grpc.UnaryUnaryMultiCallable[pb.GetPodResourcesRequest, pb.GetPodResourcesResponse]
    def __init__(self, channel: grpc.Channel) -> None: ...

class PodResourcesListerServicer:
    def List(
        self, request: pb.ListPodResourcesRequest, context: grpc.ServicerContext
    ) -> pb.ListPodResourcesResponse: ...
    def Get(
        self, request: pb.GetPodResourcesRequest, context: grpc.ServicerContext
    ) -> pb.GetPodResourcesResponse: ...

def add_PodResourcesListerServicer_to_server(servicer: PodResourcesListerServicer, server: grpc.Server) -> None: ...
