// A PKCS#11 module that is SoftHSM, but says that one more wrong PIN locks the token.
#include <dlfcn.h>
#include <stdlib.h>
#include "pkcs11go.h"

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST ours;

static CK_RV tokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info) {
	CK_RV rv = real->C_GetTokenInfo(slot, info);
	if (rv == CKR_OK)
		info->flags |= CKF_USER_PIN_FINAL_TRY;
	return rv;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list) {
	void *module = dlopen(getenv("FINALTRY_MODULE"), RTLD_NOW);
	CK_C_GetFunctionList get = module ? (CK_C_GetFunctionList)dlsym(module, "C_GetFunctionList") : NULL;
	if (!get || get(&real) != CKR_OK)
		return CKR_GENERAL_ERROR;
	ours = *real;
	ours.C_GetTokenInfo = tokenInfo;
	*list = &ours;
	return CKR_OK;
}
