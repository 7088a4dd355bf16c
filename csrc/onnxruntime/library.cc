// The entry point for SessionOptions.register_custom_ops_library. It gives a session our kernels for the nodes of the
// domain "healthgpt". Without it, ONNX Runtime runs the function bodies of these nodes.
#include "onnxruntime/operator.h"

namespace healthgpt {
namespace {

// Sessions keep pointers into the domain, so it lives as long as the library.
class Domain {
 public:
  explicit Domain(const OrtApi& api) : api_(api) {
    Check(api, api.CreateCustomOpDomain("healthgpt", &domain_));
    for (const OrtCustomOp* op : Operators()) Check(api, api.CustomOpDomain_Add(domain_, op));
  }
  ~Domain() { api_.ReleaseCustomOpDomain(domain_); }
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;

  OrtCustomOpDomain* get() const { return domain_; }

 private:
  const OrtApi& api_;
  OrtCustomOpDomain* domain_ = nullptr;
};

}  // namespace
}  // namespace healthgpt

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (api == nullptr) {
    // CreateStatus has had the same offset since version 1.
    return base->GetApi(1)->CreateStatus(kOrtFail, "the kernels of healthgpt-edge need ONNX Runtime 1.24 or newer");
  }
  return healthgpt::Guarded(*api, "healthgpt kernels", [&] {
    static const healthgpt::Domain domain(*api);
    healthgpt::Check(*api, api->AddCustomOpDomain(options, domain.get()));
  });
}
